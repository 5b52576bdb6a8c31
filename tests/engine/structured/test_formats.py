"""Texts of the formats of JSON Schema are those of the standards, as other libraries read them."""

import ipaddress
import json
import re
import uuid
from datetime import timedelta

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from engine.structured.json_schema import prepare_schema
from engine.text_formats import BOUNDED_FORMATS
from tests.engine.structured.conftest import encode
from tests.engine.structured.test_grammar import sample
from tests.engine.structured.test_json_schema import compile_schema

LONG_LABEL = "a" * 63

#: Texts that have each format, and texts that don't.
TEXTS: dict[str, tuple[list[str], list[str]]] = {
    "date": (
        ["2024-02-29", "2000-02-29", "0001-12-31", "2023-02-28"],
        ["2023-02-29", "1900-02-29", "2024-04-31", "0000-01-01", "2024-13-01"],
    ),
    "time": (
        ["10:00:00Z", "23:59:59.123456789+02:00", "00:00:00z"],
        ["10:00:00", "24:00:00Z", "10:00:00.1234567890Z"],
    ),
    "date-time": (["2024-02-29T10:00:00Z", "1999-01-01t00:00:00.5-03:30"], ["2024-02-29 10:00:00Z"]),
    "duration": (
        ["P1Y2M3DT4H5M6S", "PT1H", "P1W", "P1YT1M", "PT36H", "P123456D", "PT31536000S"],
        ["P", "PT", "PT1H1S", "P1234567D", "PT123456789S", "1D"],
    ),
    "email": (
        [
            "joe.bloggs@example.com",
            "first.last+tag@sub.example.co.uk",
            "o'neil_1@my-host.example",
            "c56a4180-65aa-42ec-a945-5fd21dec0538@reply.example.com",
            "a.b.c.d.e.f@x.org",
            f"{'a' * 64}@{LONG_LABEL}.{LONG_LABEL}.{'a' * 57}.org",
        ],
        [
            "joe",
            "@x.org",
            "joe@localhost",
            "a..b@x.org",
            ".a@x.org",
            "a.@x.org",
            "a b@x.org",
            "a@-x.org",
            f"{'a' * 65}@x.org",
            f"{'a' * 64}@{LONG_LABEL}.{LONG_LABEL}.{'a' * 58}.org",
        ],
    ),
    "hostname": (
        [
            "localhost",
            "1host",
            "a--b",
            "example.com",
            "my-pod.ns.svc.cluster.local",
            "internal-a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d6-1234567890.us-east-1.elb.amazonaws.com",
            ".".join([LONG_LABEL] * 3 + ["a" * 61]),
        ],
        [
            *("", "-a", "a-", "a..b", "a.", "a_b", "xn--zz", f"a{LONG_LABEL}"),
            ".".join([LONG_LABEL] * 3 + ["a" * 62]),
        ],
    ),
    "ipv4": (
        ["0.0.0.0", "127.0.0.1", "255.255.255.255", "10.20.30.249"],
        ["256.1.1.1", "01.2.3.4", "1.2.3", "1.2.3.4.5"],
    ),
    "ipv6": (
        [
            "::",
            "::1",
            "fe80::1",
            "2001:DB8::8a2e:370:7334",
            "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
            "::ffff:192.0.2.1",
            "1:2:3:4:5:6:192.0.2.1",
            "1:2:3:4:5:6:7::",
            "::2:3:4:5:6:7:8",
        ],
        [
            *("1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7:1.2.3.4"),
            *("1::2::3", "12345::", "::1%eth0", ":1"),
        ],
    ),
    "uuid": (
        ["123e4567-e89b-12d3-a456-426614174000", "F47AC10B-58CC-4372-A567-0E02B2C3D479"],
        ["123e4567e89b12d3a456426614174000", "123e4567-e89b-12d3-a456-42661417400g"],
    ),
    "uuid4": (
        ["f47ac10b-58cc-4372-a567-0e02b2c3d479", "F47AC10B-58CC-4372-B567-0E02B2C3D479"],
        ["123e4567-e89b-12d3-a456-426614174000", "f47ac10b-58cc-4372-7567-0e02b2c3d479"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_formats_are_those_of_the_standards(compiler, tokenizer, kind):
    grammar = compile_schema(compiler, {"type": "string", "format": kind}).matcher()
    good, bad = TEXTS[kind]
    for text in [*good, *bad]:
        matcher = grammar.clone()
        followed = matcher.accept(encode(tokenizer, json.dumps(text))) and matcher.is_complete
        assert followed == (text in good), text


DURATION = TypeAdapter(timedelta)


def check_text(kind: str, text: str) -> None:
    """Raise an error where a library refuses ``text``."""
    known = "uuid" if kind.startswith("uuid") else kind
    jsonschema_rs.validate({"format": known}, text, validate_formats=True)
    if known == "uuid":
        assert kind == "uuid" or uuid.UUID(text).version == int(kind.removeprefix("uuid"))
    elif kind == "ipv4":
        ipaddress.IPv4Address(text)
    elif kind == "ipv6":
        ipaddress.IPv6Address(text)
    elif kind == "duration":
        DURATION.validate_python(text)


@pytest.mark.parametrize("kind", BOUNDED_FORMATS)
def test_other_libraries_read_every_text(compiler, tokenizer, vocab_size, kind):
    grammar = compile_schema(compiler, {"type": "string", "format": kind})
    answers = [sample(tokenizer, vocab_size, grammar.matcher(), seed) for seed in range(40)]
    finished = [json.loads(answer) for answer in answers if answer is not None]
    assert len(finished) > 20
    for text in finished:
        check_text(kind, text)


def test_the_longest_durations_are_read():
    for text in ("P999999Y999999M999999DT999999H999999M99999999S", "P999999W"):
        assert re.fullmatch(BOUNDED_FORMATS["duration"], text)
        check_text("duration", text)


@given(st.ip_addresses(v=6), st.uuids())
def test_addresses_and_uuids_are_allowed_as_python_writes_them(address, identifier):
    for text in (str(address), address.exploded):
        assert re.fullmatch(BOUNDED_FORMATS["ipv6"], text)
    assert re.fullmatch(BOUNDED_FORMATS["uuid"], str(identifier))
    if identifier.version in range(1, 9):
        assert re.fullmatch(BOUNDED_FORMATS[f"uuid{identifier.version}"], str(identifier))


def test_a_format_beside_a_pattern_stays():
    schema = {"type": "string", "format": "time", "pattern": "^1"}
    assert prepare_schema(schema) == schema
    assert all("pattern" in prepare_schema({"format": kind}) for kind in BOUNDED_FORMATS)


@pytest.mark.parametrize(("bound", "length"), [({}, 254), ({"maxLength": 20}, 20), ({"maxLength": 900}, 254)])
def test_the_narrower_length_counts(bound, length):
    assert prepare_schema({"format": "email", **bound})["maxLength"] == length
