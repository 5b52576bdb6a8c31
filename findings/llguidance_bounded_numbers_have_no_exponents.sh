#!/usr/bin/env bash
# llguidance: a number may have an exponent, and no longer once the schema bounds it.
#
# Expected: {"type": "number", "minimum": 0} allows the answers of {"type": "number"} that aren't negative, 1e-05 and
# 2.5e3 among them.
# With minimum, maximum or multipleOf, the letter e may not come: small numbers have to be written 0.00001. There is no
# error or warning. A bound that is itself large (maximum 1e20) is refused.
# Why it matters to a server of vision-language models: scores, probabilities and measurements have bounds in most
# schemas, and models write small ones as Python prints them (json.dumps(0.00001) is 1e-05). A model that has written
# the 1 can't go on, and answers 1 or 1.0 instead.
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


every_byte = llguidance.LLTokenizer(
    llguidance.TokenizerWrapper(Vocabulary([bytes([byte]) for byte in range(256)]))
)
print("llguidance", llguidance.__version__)


def matcher_of(schema):
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return llguidance.LLMatcher(every_byte, grammar, log_level=0)


def is_answer(schema, text):
    matcher = matcher_of(schema)
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


def next_characters(schema, text):
    matcher = matcher_of(schema)
    assert all(matcher.consume_token(byte) for byte in text.encode())
    mask = np.zeros((every_byte.vocab_size + 31) // 32, np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return "".join(chr(token) for token in allowed if token < 256)


number = {"type": "number"}
bounds = [{"minimum": 0}, {"exclusiveMinimum": 0}, {"maximum": 1e6}, {"multipleOf": 0.00001}]
print(number, "after 1:", next_characters(number, "1"))
assert set(next_characters(number, "1")) == set(".0123456789eE")
assert is_answer(number, json.dumps(0.00001)) and is_answer(number, "2.5e3")
for bound in bounds:
    schema = number | bound
    print(schema, "after 1:", next_characters(schema, "1"))
    assert is_answer(schema, "0.00001") and is_answer(schema, "2500.0")
    assert set(next_characters(schema, "1")) == set(".0123456789"), "exponents are allowed now"
    assert not is_answer(schema, json.dumps(0.00001)) and not is_answer(schema, "2.5e3")
message = matcher_of(number | {"maximum": 1e20}).get_error().splitlines()[0]
print("maximum of 1e20:", message)
assert "Failed to generate regex for float range" in message
PY
"$work/venv/bin/python" "$work/probe.py"
