#!/usr/bin/env bash
# llguidance: a string of a JSON schema may begin \u00, and then only a control character can come.
#
# Expected: {"type": "string"} allows every JSON string, "caf\u00e9" among them; or the escape can't be begun.
# It can be begun: \u00 is allowed, and after it only 0, 1 and 7 are. The answer parses, with another character
# than the one that the model meant: \u00e9 becomes \u0000 to \u001f, or \u007f.
# With x-guidance {"json_allow_general_unicode_escapes": true} all hexadecimal digits may follow. It isn't the default.
# Why it matters to a server of vision-language models: models trained on ASCII JSON write accents as escapes when
# they read text from an image. Constrained, they give a wrong letter, and nothing says so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q llguidance==1.9.1 numpy
cat > "$work/probe.py" <<'PY'
import json

import llguidance
import numpy as np


class Vocabulary:
    """The tokens given, and one that ends answers."""

    bos_token_id = None

    def __init__(self, tokens):
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text):
        if not isinstance(text, str):
            raise TypeError("a text, not bytes")
        single = [bytes([byte]) for byte in text.encode()]
        return [self.tokens.index(byte) for byte in single if byte in self.tokens]


def tokenizer_of(tokens, **options):
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(tokens)), **options)


def after(tokenizer, grammar, tokens):
    """The tokens that may follow ``tokens``; None if those may not come themselves."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    if not all(matcher.consume_token(token) for token in tokens):
        return None
    mask = np.zeros((tokenizer.vocab_size + 31) // 32, np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


every_byte = tokenizer_of([bytes([byte]) for byte in range(256)])
print("llguidance", llguidance.__version__)


def next_characters(schema, text):
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    found = after(every_byte, grammar, text.encode())
    return None if found is None else "".join(map(chr, found))


plain = next_characters({"type": "string"}, '"caf\\u00')
general = {"type": "string", "x-guidance": {"json_allow_general_unicode_escapes": True}}
print("after \\u00:", plain, "and with the option:", next_characters(general, '"caf\\u00'))
assert next_characters({"type": "string"}, '"caf\\u00e') is None
assert plain == "017", "other characters can be written as escapes now"
assert "e" in next_characters(general, '"caf\\u00')
PY
"$work/venv/bin/python" "$work/probe.py"
