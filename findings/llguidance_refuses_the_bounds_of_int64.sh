#!/usr/bin/env bash
# llguidance: a schema with the full range of a 64-bit integer is refused, and that of an unsigned one is cut in half.
#
# Expected: {"type": "integer", "minimum": -2**63, "maximum": 2**63 - 1} allows every integer of 64 bits, and a maximum
# of 2**64 - 1 every unsigned one.
# The first is refused: "Failed to generate regex for integer range". With the second, no number above 2**63 - 1 may
# come, without an error or a warning.
# Why it matters to a server of vision-language models: schemas of tools and of table columns are generated from types,
# and state their range. A request with such a schema fails as a whole, and ids above 2**63 can't be written.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q llguidance==1.9.1
cat > "$work/probe.py" <<'PY'
import json

import llguidance


class Bytes:
    """A token for each byte, and one that ends answers."""

    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    eos_token_id = 256
    special_token_ids = [256]

    def __call__(self, text):
        if not isinstance(text, str):
            raise TypeError("a text, not bytes")
        return list(text.encode())


every_byte = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
print("llguidance", llguidance.__version__)


def matcher_of(low, high):
    schema = {"type": "integer", "minimum": low, "maximum": high}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return llguidance.LLMatcher(every_byte, grammar, log_level=0)


def is_answer(low, high, number):
    matcher = matcher_of(low, high)
    return all(matcher.consume_token(byte) for byte in str(number).encode()) and matcher.is_accepting()


signed = matcher_of(-(2**63), 2**63 - 1)
assert signed.is_error(), "the range of int64 is taken now"
print("int64:", signed.get_error().splitlines()[0])
assert "Failed to generate regex for integer range" in signed.get_error()
for number in (2**63 - 1, 2**63, 2**64 - 1):
    print("uint64:", number, "may come:", is_answer(0, 2**64 - 1, number))
assert is_answer(0, 2**64 - 1, 2**63 - 1)
assert not is_answer(0, 2**64 - 1, 2**63), "unsigned integers are allowed now"
PY
"$work/venv/bin/python" "$work/probe.py"
