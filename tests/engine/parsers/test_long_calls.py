"""Long calls, and long patterns of their texts, are read once: others must not wait for them.

A call's argument comes in small pieces. A pattern is read for each request that has one.
"""

import pytest

from engine.parsers import gemma4
from engine.parsers.call_forms import whole_text
from engine.parsers.events import CallArguments, Text
from engine.parsers.glm import GlmCalls
from engine.parsers.json_call import JsonCall
from engine.parsers.leading_json import LeadingJsonCalls
from engine.parsers.mistral import MistralCalls
from engine.parsers.muse import MuseCalls
from engine.parsers.pythonic import _CallScan
from engine.parsers.qwen_xml import QwenXmlCalls

LONG = "some words, " * 200


class Counted(str):
    """A text that counts the characters that are looked at."""

    looked_at = 0

    def __getitem__(self, index):
        Counted.looked_at += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("end", [None, "<|tool_call_end|>"])
def test_characters_of_python_calls_are_looked_at_once(monkeypatch, end):
    monkeypatch.setattr(Counted, "looked_at", 0)
    scan, text = _CallScan(), f"[f(a='{LONG}', b={{'(': [1]}})]"
    for length in range(len(text)):
        found = scan.next(Counted(text[:length]), end)
        if found is not None:
            break
    assert found == ("call", text.rindex(")") + 1) and scan.start == 1
    assert len(text) <= Counted.looked_at < 2 * len(text)


@pytest.mark.parametrize(
    ("parser", "before"),
    [(LeadingJsonCalls(), ""), (MistralCalls(), "[TOOL_CALLS][")],
    ids=["llama", "mistral"],
)
def test_a_call_whose_name_comes_last_is_read_once(monkeypatch, parser, before):
    read, feed = [], JsonCall.feed
    monkeypatch.setattr(JsonCall, "feed", lambda self, text: read.append(len(text)) or feed(self, text))
    text = f'{before}{{"arguments": {{"a": "{LONG}"}}, "name": "f"}}'
    events = [event for place in range(0, len(text), 3) for event in parser.feed(text[place : place + 3])]
    assert [getattr(event, "name", None) for event in events] == ["f", None]
    assert events[1].text == f'{{"a": "{LONG}"}}'
    assert len(text) - len(before) <= sum(read) < 2 * len(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("pattern", "is_followed"),
    [
        ("[" + r"\a" * 100_000, True),
        ("[" * 200_000, True),
        ("(" * 100_000 + ")" * 100_000, True),
        (r"[\]^]" * 50_000, True),
        ("[" + r"\a" * 100_000 + "]|b", False),
        ("(" * 100_000 + "a|b" + ")" * 100_000, True),
        ("a)|(b", False),
    ],
    ids=[
        "escapes in a class",
        "classes",
        "groups",
        "brackets in classes",
        "choice",
        "choice in groups",
        "ends",
    ],
)
def test_patterns_of_any_length_are_read_once(pattern, is_followed):
    """Time that doubles with each escape, or grows as the square of the length, would outlast the test."""
    assert (whole_text(f"^{pattern}$") is not None) is is_followed


@pytest.mark.parametrize(
    "value", [f'"{LONG}"', LONG.replace(",", ""), f'<|"|>{LONG}<|"|>'], ids=["json", "bare", "quoted"]
)
@pytest.mark.parametrize("is_key", [False, True])
def test_values_and_keys_of_gemma4_are_scanned_once(monkeypatch, value, is_key):
    scanned, first_marker, in_string = [], gemma4.first_marker, gemma4._IN_STRING

    class Scan:
        def match(self, text, start):
            scanned.append(len(text) - start)
            return in_string.match(text, start)

    def scan(text, markers, start):
        scanned.append(len(text) - start)
        return first_marker(text, markers, start)

    monkeypatch.setattr(gemma4, "_IN_STRING", Scan())
    monkeypatch.setattr(gemma4, "first_marker", scan)
    parser = gemma4.Gemma4Calls()
    parser.feed("<|tool_call>call:f{")
    text = (f"{value}:1" if is_key else f"a:{value}") + "}<tool_call|>"
    events = [event for place in range(0, len(text), 3) for event in parser.feed(text[place : place + 3])]
    arguments = "".join(event.text for event in events if isinstance(event, CallArguments))
    assert arguments.count("words") == 200
    # What may be the beginning of a marker is looked at again.
    assert sum(scanned) < 8 * len(text)


class Searched(str):
    """A text that counts the characters that are searched."""

    searched = 0

    def find(self, text, start=0, end=None):
        end = len(self) if end is None else min(end, len(self))
        position = super().find(text, start, end)
        Searched.searched += (end if position < 0 else position + len(text)) - start
        return position

    def __add__(self, text):
        return Searched(super().__add__(text))

    def __getitem__(self, index):
        return Searched(super().__getitem__(index))


@pytest.mark.parametrize(
    ("parser", "before", "after"),
    [
        (MuseCalls, ' to=f<|message|><atem:invoke name="f"><atem:parameter name="a">', "</atem:parameter>"),
        (
            MuseCalls,
            " to=f<|message|>",
            '<atem:invoke name="f"><atem:parameter name="a">words</atem:parameter>',
        ),
        (GlmCalls, "<tool_call>f\n<arg_key>a</arg_key><arg_value>", "</arg_value>"),
        (QwenXmlCalls, "<function=f><parameter=a>", "</parameter>"),
    ],
    ids=["muse", "muse without tags", "glm", "qwen_xml"],
)
def test_values_between_tags_are_searched_once(monkeypatch, parser, before, after):
    monkeypatch.setattr(Searched, "searched", 0)
    calls = parser({})
    calls._buffer = Searched()
    text = before + 4 * LONG + after
    events = [event for place in range(0, len(text), 3) for event in calls.feed(text[place : place + 3])]
    assert "words" in "".join(event.text for event in events if isinstance(event, CallArguments))
    # The tags before the value, and what may be the beginning of a marker, are looked at again.
    assert len(text) <= Searched.searched < 60 * len(text)


def test_a_name_of_gemma4_without_end_is_not_held():
    parser = gemma4.Gemma4Calls()
    assert [type(event) for event in parser.feed("<|tool_call>call:" + 200 * "x")] == [Text, Text]
