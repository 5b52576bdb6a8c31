"""Thoughts, and thoughts together with tool calls."""

import pytest

from engine.parsers.answer import AnswerParser
from engine.parsers.leading_json import LeadingJsonCalls
from engine.parsers.reasoning import ReasoningParser, ReasoningTags
from engine.parsers.tagged import TaggedCalls
from tests.engine.parsers.cuts import parse

THINK = ReasoningTags("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "visible"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, "hm", "Yes."),
        ("hm\n\nhm\n</think>\n\nYes.", True, "hm\n\nhm", "Yes."),
        # The prompt has opened the thought, and the model opens it again.
        ("<think>\nhm</think>Yes.", True, "hm", "Yes."),
        ("<think></think>Yes.", False, "", "Yes."),
        ("\n\n</think>\n\nYes.", True, "", "Yes."),
        # Never closed.
        ("<think>\nhm ", False, "hm", ""),
        ("hm </thin", True, "hm </thin", ""),
        # No thought.
        ("Yes.", False, "", "Yes."),
        (" Yes <think>x</think>", False, "", " Yes <think>x</think>"),
        ("<thi", False, "", "<thi"),
        ("  ", False, "", "  "),
        # Later tags belong to the text.
        ("<think>a</think>b</think>c <think>", False, "a", "b</think>c <think>"),
    ],
)
def test_thoughts_for_every_cut(text, inside, reasoning, visible):
    found = parse(lambda: ReasoningParser(THINK, begins_inside=inside), text)
    assert (found["reasoning"], found["text"]) == (reasoning, visible)


def answer() -> AnswerParser:
    return AnswerParser(ReasoningParser(THINK), TaggedCalls(("<tool_call>",), "</tool_call>"))


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</think>"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "reasoning", "visible"),
    [
        (f"<think>\nI call.\n</think>\n\n{CALL}", "I call.", ""),
        (f"<think>\nI call.\n</think>\n\nLook:\n{CALL}\n", "I call.", "Look:"),
        # Within a thought, and a thought that a call ends.
        (f"<think>\nI call.\n{CALL}\nSo.\n</think>\nYes.", "I call.\nSo.", "Yes."),
        (f"<think>\nI call.\n{CALL}", "I call.", ""),
        (f"{CALL}", "", ""),
    ],
)
def test_calls_and_thoughts(text, reasoning, visible):
    found = parse(answer, text)
    assert found["calls"] == [("f", '{"x": "</think>"}')]
    assert (found["reasoning"], found["text"]) == (reasoning, visible)


def test_a_call_at_the_beginning_is_looked_for_behind_the_thought():
    def make() -> AnswerParser:
        return AnswerParser(ReasoningParser(THINK), LeadingJsonCalls(), calls_in_thoughts=False)

    found = parse(make, '<think>hm {"name": "no"}</think>\n{"name": "f", "parameters": {}}')
    assert found == {"reasoning": 'hm {"name": "no"}', "text": "", "calls": [("f", "{}")]}
