"""Thoughts, and thoughts together with tool calls."""

import pytest

from engine.parsers.answer import AnswerParser
from engine.parsers.formats import REASONING_TAGS
from engine.parsers.leading_json import LeadingJsonCalls
from engine.parsers.muse import MuseCalls
from engine.parsers.reasoning import ReasoningParser, ReasoningTags
from engine.parsers.tagged import TaggedCalls
from tests.engine.parsers.cuts import parse

THINK = ReasoningTags("<think>", "</think>")
GEMMA4 = REASONING_TAGS["gemma4"]


def read(tags: ReasoningTags, text: str, inside: bool = False) -> tuple[str, str]:
    """The thought and the visible text of an answer, however it is cut."""
    found = parse(lambda: ReasoningParser(tags, begins_inside=inside), text)
    return found["reasoning"], found["text"]


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "visible"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, "hm", "Yes."),
        ("hm\n\nhm\n</think>\n\nYes.", True, "hm\n\nhm", "Yes."),
        # The prompt has opened the thought, and the model opens it again.
        ("<think>\nhm</think>Yes.", True, "hm", "Yes."),
        ("<think><think>\n<think>hm</think>Yes.", False, "hm", "Yes."),
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
    assert read(THINK, text, inside) == (reasoning, visible)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "visible"),
    [
        ("<|channel>thought\nhm\n<channel|>Yes.", False, "hm", "Yes."),
        ("<|channel>thought\n<channel|>Yes.", False, "", "Yes."),
        ("hm<channel|>Yes.", True, "hm", "Yes."),
        ("<|channel>hm, a thought\n<channel|>Yes.", False, "hm, a thought", "Yes."),
        ("<|channel>thoughtful<channel|>Yes.", False, "thoughtful", "Yes."),
        # Cut off within the label.
        ("<|channel>thou", False, "", ""),
    ],
)
def test_the_label_of_a_thought_is_no_part_of_it(text, inside, reasoning, visible):
    assert read(GEMMA4, text, inside) == (reasoning, visible)


@pytest.mark.parametrize(
    ("text", "reasoning", "visible"),
    [
        (
            "<|START_THINKING|>hm<|END_THINKING|>\n<|START_RESPONSE|> Yes.\n<|END_RESPONSE|>",
            "hm",
            "Yes.\n",
        ),
        ("<|START_RESPONSE|>Yes.<|END_RESPONSE|>", "", "Yes."),
        ("Yes. <|START_RESP", "", "Yes. <|START_RESP"),
    ],
)
def test_tags_around_the_visible_text_are_no_part_of_it(text, reasoning, visible):
    assert read(REASONING_TAGS["cohere"], text) == (reasoning, visible)


def test_a_prompt_may_have_opened_a_thought_with_or_without_its_label():
    for prompt in ("<|turn>model\n<|channel>thought\n", "<|channel>"):
        assert GEMMA4.open_in(prompt)
    for prompt in ("<|turn>model\n", "<|channel>thought\n<channel|>", "thought\n", ""):
        assert not GEMMA4.open_in(prompt)


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


_MUSE_CALL = (
    '<atem:function_calls>\n<atem:invoke name="f">\n<atem:parameter name="x">1</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls>"
)


@pytest.mark.parametrize(
    ("text", "reasoning", "visible", "calls"),
    [
        (" to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Yes.", "Hm.", "Yes.", []),
        (" to=user<|message|>Yes.", "", "Yes.", []),
        (
            f" to=self<|message|>Like {_MUSE_CALL}?<|eom|>"
            f"<|start|>assistant to=f<|message|>\n{_MUSE_CALL}<|eom|>"
            "<|start|>assistant to=user<|message|>I asked.<|eom|>",
            f"Like {_MUSE_CALL}?",
            "I asked.",
            [("f", '{"x": 1}')],
        ),
        (f" to=self<|message|>Hm.<|eom|>{_MUSE_CALL}", "Hm.", "", [("f", '{"x": 1}')]),
        (" to=self<|message|>Hm", "Hm", "", []),
        (" to=us", "", " to=us", []),
        (
            " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Yes.<|eom|>"
            "<|start|>assistant to=self<|message|> So?<|eom|><|start|>assistant to=user<|message|>No.",
            "Hm.So?",
            "Yes.No.",
            [],
        ),
    ],
)
def test_answers_in_messages_to_somebody(text, reasoning, visible, calls):
    tags, schemas = REASONING_TAGS["muse"], {"f": {"properties": {"x": {"type": "integer"}}}}
    found = parse(lambda: AnswerParser(ReasoningParser(tags), MuseCalls(schemas)), text)
    assert (found["reasoning"], found["text"], found["calls"]) == (reasoning, visible, calls)
    if not calls:
        assert read(tags, text) == (reasoning, visible)


def test_a_message_that_is_begun_by_the_prompt_has_its_tag_dropped_where_thoughts_are_shown():
    found = parse(
        lambda: ReasoningParser(REASONING_TAGS["muse"], thinks=False), " to=user<|message|>Yes.<|eom|>"
    )
    assert (found["reasoning"], found["text"]) == ("", "Yes.")
