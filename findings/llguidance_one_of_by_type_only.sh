#!/usr/bin/env bash
# llguidance: oneOf of values that exclude each other is refused, unless they are strings or differ in type.
#
# Expected: oneOf of two different constants is taken, whatever their type, since no answer matches both.
# {"const": "a"} or {"const": "b"} is taken. {"const": 1} or {"const": 2} is refused, and so are the strings once they
# stand under $defs and are named by $ref, which is how Pydantic writes them.
# Why it matters to a server of vision-language models: discriminated unions of extracted records are such schemas.
# A server has to rewrite them to anyOf itself, or refuse what works with inline strings.
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


def is_refused(schema):
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    print("refused" if is_error else "taken  ", json.dumps(schema), *messages[:1])
    return is_error


print("llguidance", llguidance.__version__)
named = {"$defs": {"A": {"const": "a"}, "B": {"const": "b"}}}
assert not is_refused({"oneOf": [{"const": "a"}, {"const": "b"}]})
assert not is_refused({"oneOf": [{"type": "integer"}, {"type": "string"}]})
assert is_refused({"oneOf": [{"const": 1}, {"const": 2}]}), "numbers are taken now"
assert is_refused({**named, "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}), "$ref is taken now"
PY
"$work/venv/bin/python" "$work/probe.py"
