#!/usr/bin/env bash
# llguidance: the integers of a schema are doubles, so const may allow another number and forbid its own.
#
# Expected: {"const": 9007199254740993} allows this answer alone, as Python's jsonschema and most validators read it; or
# the schema is refused. JSON Schema has no largest integer.
# It allows 9007199254740992 alone. So does enum, and minimum, exclusiveMinimum and maximum are off by a few, too. There
# is no error or warning. A maximum above 2**63 - 1 becomes 2**63 - 1; such a minimum is refused.
# Why it matters to a server of vision-language models: numbers read from labels and documents are this long (a shipping
# label's SSCC has 18 digits, as have the ids of many web services). A forced choice among known ids then answers with
# an id that is none of them. A server has to refuse such schemas itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q llguidance==1.9.1 jsonschema==4.26.0 numpy
cat > "$work/probe.py" <<'PY'
import json

import jsonschema
import llguidance


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


def is_valid(schema, text):
    return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


odd = 2**53 + 1
wrong = 0
for schema, number in (
    ({"const": odd}, odd),
    ({"const": odd}, odd - 1),
    ({"enum": [76561198000000001, 76561198000000003]}, 76561198000000001),
    ({"enum": [76561198000000001, 76561198000000003]}, 76561198000000000),
    ({"type": "integer", "minimum": odd}, odd - 1),
    ({"type": "integer", "exclusiveMinimum": odd - 1}, odd - 1),
    ({"type": "integer", "maximum": odd}, odd),
    ({"type": "integer", "maximum": 10**24}, 2**63 - 1),
    ({"type": "integer", "maximum": 10**24}, 2**63),
):
    valid, allowed = is_valid(schema, str(number)), is_answer(schema, str(number))
    wrong += valid != allowed
    names = "valid" if valid else "not valid", "allowed" if allowed else "forbidden"
    print(json.dumps(schema), number, ":", *names)
assert wrong == 8, f"{wrong} of 9 answers differ now"
assert is_answer({"type": "integer", "minimum": 0}, str(10**24))
message = matcher_of({"type": "integer", "minimum": 10**24}).get_error().splitlines()[0]
print("minimum of 10**24:", message)
assert "min=Some(9223372036854775807)" in message
PY
"$work/venv/bin/python" "$work/probe.py"
