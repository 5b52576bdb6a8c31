"""Content blocks and events of answers with thoughts and calls, without a model."""

import random

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from deployments.answers import ChoiceDelta
from deployments.messages import MessageBuilder
from deployments.protocol.content_blocks import ChatMessages
from engine.errors import InvalidRequest
from engine.outputs import Usage
from engine.parsers.events import CallArguments, CallStart, Reasoning, Text

EVENT = TypeAdapter(RawMessageStreamEvent)
ANSWER = [
    Reasoning("I need "),
    Reasoning("colours."),
    Text("Let me "),
    Text("look."),
    CallStart(0, "report"),
    CallArguments(0, '{"color":'),
    CallArguments(0, '"red"}'),
    CallStart(1, "stop"),
    CallArguments(1, "{}"),
    Text("Done."),
]


def built(events, *, reason="stop", stop=None, **options) -> tuple[MessageBuilder, list[dict]]:
    """The message of an answer that comes in deltas of one to three events, and all its events."""
    builder = MessageBuilder("m", 100, **options)
    made = builder.begin(Usage(7, 1, 2))
    draw = random.Random(len(events))
    delta = ChoiceDelta(0, [], [], finish_reason=reason, stop_reason=stop)
    while events:
        count = draw.randint(1, 3)
        delta = ChoiceDelta(0, events[:count], [1], finish_reason=reason, stop_reason=stop)
        made += builder.add(delta)
        events = events[count:]
    made += builder.finish(delta, Usage(7, 9, 2), 4)
    return builder, made


def test_blocks_of_thoughts_texts_and_calls():
    builder, events = built(ANSWER, reason="tool_calls")
    message = Message.model_validate(builder.message)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use", "text"]
    thought, text, call, _, end = message.content
    assert (thought.thinking, text.text, call.input, end.text) == (
        "I need colours.",
        "Let me look.",
        {"color": "red"},
        "Done.",
    )
    assert thought.signature and message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (5, 2)
    assert (message.usage.output_tokens, message.usage.output_tokens_details.thinking_tokens) == (9, 4)
    for event in events:
        if event["type"] != "ping":
            EVENT.validate_python(event)


def test_deltas_join_up_to_the_blocks():
    builder, events = built(ANSWER)
    joined: dict[int, str] = {}
    open_block = None
    for event in events:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == len(joined)
            open_block, joined[event["index"]] = event["index"], ""
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
            delta = event["delta"]
            joined[open_block] += (
                delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
            )
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
    assert list(joined.values()) == ["I need colours.", "Let me look.", '{"color":"red"}', "{}", "Done."]
    assert builder.message["stop_reason"] == "end_turn"


def test_thoughts_may_be_left_out():
    builder, events = built(ANSWER, shows_thoughts=False)
    assert builder.message["content"][0]["thinking"] == "" and builder.message["content"][0]["signature"]
    assert "colours" not in str(events)


def test_arguments_that_were_cut():
    cut = [CallStart(0, "report"), CallArguments(0, '{"color":"red","count":[1,2')]
    builder, _ = built(cut, reason="length")
    assert builder.message["content"][0]["input"] == {"color": "red", "count": [1, 2]}
    builder, _ = built([CallStart(0, "report")], reason="length")
    assert builder.message["content"][0]["input"] == {}


def test_an_answer_without_content():
    builder, _ = built([], stop="END")
    assert builder.message["content"] == []
    assert (builder.message["stop_reason"], builder.message["stop_sequence"]) == ("stop_sequence", "END")


def test_messages_in_openais_form():
    chat = ChatMessages()
    chat.add({"role": "user", "content": "One"}, "messages[0]")
    chat.add({"role": "user", "content": [{"type": "text", "text": "two"}]}, "messages[1]")
    chat.add(
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "b", "name": "f", "input": {}},
            ],
        },
        "messages[2]",
    )
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    chat.add(
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": "no", "is_error": True},
                {"type": "tool_result", "tool_use_id": "a", "content": [image]},
                {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Doc"}},
            ],
        },
        "messages[3]",
    )
    called = [
        {"id": name, "type": "function", "function": {"name": "f", "arguments": arguments}}
        for name, arguments in (("a", {"x": 1}), ("b", {}))
    ]
    text = {"type": "text", "text": "Error: "}
    assert chat.messages == [
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": [{"type": "text", "text": "Wait."}],
            "tool_calls": called,
        },
        {"role": "tool", "tool_call_id": "b", "content": [text, {"type": "text", "text": "no"}]},
        {
            "role": "tool",
            "tool_call_id": "a",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        },
        {"role": "user", "content": [{"type": "text", "text": "Doc"}]},
    ]
    assert chat.fields["messages[0].content[1]"] == "messages[1].content[0]"
    assert chat.fields["messages[3].content[0].image_url.url"] == "messages[3].content[1].content[0].source"


@pytest.mark.parametrize(
    ("role", "block", "param"),
    [
        ("user", {"type": "thinking", "thinking": "x"}, "messages[0].content[0]"),
        ("assistant", {"type": "tool_result", "tool_use_id": "a"}, "messages[0].content[0]"),
        ("assistant", {"type": "tool_use", "id": "a", "name": 5, "input": {}}, "messages[0].content[0].name"),
        ("assistant", {"type": "tool_use", "id": "a", "name": "f", "input": []}, None),
        ("user", {"type": "tool_result", "content": "x"}, "messages[0].content[0].tool_use_id"),
        ("user", {"type": "image", "source": {"type": "file", "file_id": "x"}}, None),
    ],
)
def test_blocks_that_are_refused(role, block, param):
    chat = ChatMessages()
    if param is None:
        param = "messages[0].content[0]" + (".source.type" if "source" in block else ".input")
        if "source" not in block:
            block = {**block, "input": ["a"]}
    with pytest.raises(InvalidRequest) as refused:
        chat.add({"role": role, "content": [block]}, "messages[0]")
    assert refused.value.param == param
