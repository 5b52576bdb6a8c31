"""Calls as JSON between tags."""

import json

import pytest

from engine.parsers.tagged import TaggedCalls
from tests.engine.parsers.cuts import parse


def hermes() -> TaggedCalls:
    return TaggedCalls(("<tool_call>",), "</tool_call>")


def block(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "visible", "calls"),
    [
        ("Hello!", "Hello!", []),
        ("a < b and <tool", "a < b and <tool", []),
        (block("f", '{"x": 1}'), "", [("f", '{"x": 1}')]),
        (f"Let me look.\n\n{block('f', '{}')}\n", "Let me look.", [("f", "{}")]),
        (f"{block('f', '{}')}\n{block('g', '{}')}", "", [("f", "{}"), ("g", "{}")]),
        (f"{block('f', '{}')} and more ", " and more ".lstrip(), [("f", "{}")]),
        # Brackets, quotes and tags within strings.
        (block("f", r'{"x": "}]\"</tool_call>\\"}'), "", [("f", r'{"x": "}]\"</tool_call>\\"}')]),
        (block("f", '{"x": {"y": [1, {"z": "ü😀"}]}}'), "", [("f", '{"x": {"y": [1, {"z": "ü😀"}]}}')]),
        # The other order of keys, other names, more fields.
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"id": 7, "name": "f", "parameters": {}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        # The end is missing: the answer was cut, or the model left it out.
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
        ('<tool_call>{"name": "f", "arguments": {}}hello', "hello", [("f", "{}")]),
        # No calls: the text stays as it is.
        ("<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", []),
        ('x <tool_call>{"nam', 'x <tool_call>{"nam', []),
        ('<tool_call>{"n": 1}</tool_call>', '<tool_call>{"n": 1}</tool_call>', []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("<tool_call>[1]" + block("f", "{}"), "<tool_call>[1]", [("f", "{}")]),
        # Broken behind the name: the call's rest is dropped, what follows is read.
        (
            '<tool_call>{"name": "f", "arguments": {"a": ]}}</tool_call>\n' + block("g", "{}"),
            "",
            [("f", '{"a": '), ("g", "{}")],
        ),
        ('<tool_call>{"name": "f", "other": 1}</tool_call>ok', "ok", [("f", "")]),
    ],
)
def test_calls_and_text_for_every_cut(text, visible, calls):
    found = parse(hermes, text)
    assert found["text"] == visible
    assert found["calls"] == calls


def test_arguments_arrive_before_the_call_ends():
    parser = hermes()
    parser.feed('<tool_call>{"name": "f", "arguments": {"text": "')
    assert [event.text for event in parser.feed("a long answer")] == ["a long answer"]


def test_arguments_of_every_json_value():
    for value in (None, True, -1.5e3, "", 'q"\\', [], [[1], {}], {"a": {"b": []}}):
        arguments = json.dumps({"value": value})
        assert parse(hermes, block("f", arguments))["calls"] == [("f", arguments)]
