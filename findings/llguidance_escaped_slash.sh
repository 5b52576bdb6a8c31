#!/usr/bin/env bash
# llguidance: the escape \/ is valid JSON, and can't come in any string, nor be switched on.
#
# Expected: {"type": "string"} allows every JSON string, "a\/b" among them.
# After a backslash all other escapes may come, the slash may not. json_allowed_escapes refuses it by name.
# Why it matters to a server of vision-language models: many web APIs write URLs as http:\/\/, and so do models that
# were trained on their output. A model whose token for the backslash is a token of its own has begun an escape when
# it learns that the slash is forbidden, and must write another character.
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


found = next_characters({"type": "string"}, '"a\\')
print("after a backslash:", found)
assert json.loads('"a\\/b"') == "a/b"
assert set(found) == set('"\\bfnrtu'), "the slash may be escaped now"
schema = {"type": "string", "x-guidance": {"json_allowed_escapes": 'nrbtf\\"/'}}
grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
print("switched on:", messages[0].splitlines()[0])
assert is_error and "invalid escape character" in messages[0]
PY
"$work/venv/bin/python" "$work/probe.py"
