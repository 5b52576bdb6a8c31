#!/usr/bin/env bash
# llguidance: the option that allows all \uXXXX escapes has no effect in strings that have a pattern.
#
# Expected: with x-guidance {"json_allow_general_unicode_escapes": true}, a string with a pattern that allows any
# character can hold \u00e9, as a string without a pattern can; or the schema is refused.
# It can't, and there is no error or warning: after \u00 only 0, 1 and 7 may come, as without the option.
# Why it matters to a server of vision-language models: schemas for text that is read from images have patterns for
# some fields ("^.{1,80}$"). The option looks like the remedy for letters that come out wrong, and isn't for them.
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


option = {"json_allow_general_unicode_escapes": True}
free = next_characters({"type": "string", "x-guidance": option}, '"caf\\u00')
bound = next_characters({"type": "string", "pattern": "^.*$", "x-guidance": option}, '"caf\\u00')
print("after \\u00, without a pattern:", free, "and with one:", bound)
assert "e" in free
assert bound == "017", "the option counts for patterns now"
PY
"$work/venv/bin/python" "$work/probe.py"
