#!/usr/bin/env bash
# llguidance: the format "date" knows how long each month is, and gives every year a 29 February.
#
# Expected: "format": "date" is a full-date of RFC 3339, where only leap years have a 29 February (section 5.7).
# The grammar refuses 30 February and 31 April, so one takes its dates for real ones. 2023-02-29 and 1900-02-29 are
# allowed, in date-time as well. A second 60 may end any minute; leap seconds are at 23:59:60 UTC alone.
# Why it matters to a server of vision-language models: dates are what invoices and forms are read for. An answer that
# "always follows the schema" then fails in the client that parses it (Python's date.fromisoformat raises).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q llguidance==1.9.1 numpy
cat > "$work/probe.py" <<'PY'
import datetime
import json

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


def is_day(text):
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


days = ["2024-02-29", "2023-02-28", "2023-02-30", "2023-04-31", "2023-02-29", "1900-02-29"]
for day in days:
    allowed = is_answer({"type": "string", "format": "date"}, json.dumps(day))
    in_time = is_answer({"type": "string", "format": "date-time"}, json.dumps(day + "T12:00:00Z"))
    print(day, "is a day," if is_day(day) else "is no day,", "allowed" if allowed else "forbidden")
    assert allowed == in_time == (is_day(day) or day.endswith("02-29")), "29 February depends on the year now"
times = {text: is_answer({"type": "string", "format": "time"}, json.dumps(text)) for text in ("23:59:60Z", "12:00:60Z")}
print("times:", times)
assert all(times.values())
PY
"$work/venv/bin/python" "$work/probe.py"
