"""Calls whose only argument is a free text. The reference is Python's ``json``."""

import json

import pytest

from engine.parsers.free_text import FreeText, FreeTextCalls
from engine.parsers.tagged import TaggedCalls
from tests.engine.parsers.cuts import joined, parse


def make() -> FreeTextCalls:
    return FreeTextCalls(TaggedCalls(("<tool_call>",), "</tool_call>"), {"run"})


def block(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    "text",
    ["", "ls -l", 'echo "a\\b"\n\tx/y\b\f\r', "\x00\x7f", '{"input": "x"}', "Zoë 😀😀 \u2028", "\\u00e9"],
)
def test_the_text_of_every_cut_is_what_json_reads(text, ascii_only):
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    assert parse(make, block("run", arguments))["calls"] == [("run", text)]


def test_other_calls_keep_their_json():
    arguments = json.dumps({"input": "a\nb"})
    found = parse(make, block("run", arguments) + block("other", arguments) + block("run", arguments))
    assert found["calls"] == [("run", "a\nb"), ("other", arguments), ("run", "a\nb")]


@pytest.mark.parametrize(
    ("string", "text"),
    [
        (r"a\ud83d", "a\ufffd"),
        (r"\ud83db", "\ufffdb"),
        (r"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (r"\ude00\n", "\ufffd\n"),
        (r"\ud83d\n\ude00", "\ufffd\n\ufffd"),
        (r"\x", r"\x"),
    ],
)
def test_what_no_text_can_hold(string, text):
    """Python's ``json`` gives halves of pairs, which can't be sent."""
    assert parse(make, block("run", f'{{"input": "{string}"}}'))["calls"] == [("run", text)]


@pytest.mark.parametrize(
    "arguments",
    ["{}", '{"inputs": "a"}', '{"input": 5}', '{"cmd": "a", "input": "b"}', f'{{{" " * 80}"input": "a"}}'],
)
def test_other_arguments_are_the_text_themselves(arguments):
    """A model may write them where no grammar holds it."""
    assert parse(make, block("run", arguments))["calls"] == [("run", arguments)]


@pytest.mark.parametrize("begin", ['{"inputs": "', '{"input": "a", "more": "', " "])
def test_little_is_held_back(begin):
    """What is held back is looked at again with each piece."""
    text, given = FreeText(), 0
    for piece in (begin, *[" "] * 200):
        given += len(text.feed(piece))
    expected = 1 if "more" in begin else len(begin) + 200
    assert given == expected and len(text._buffer) < 100


def test_a_call_that_is_cut_has_the_text_so_far():
    whole = block("run", json.dumps({"input": "a\u00e9\U0001f600b"}))
    for end in range(len(whole)):
        for _, text in joined(make(), [whole[:end]])["calls"]:
            assert "a\u00e9\U0001f600b".startswith(text)
