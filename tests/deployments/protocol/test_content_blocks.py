"""Anthropic's blocks as messages in OpenAI's form."""

import pytest

from deployments.errors import UnsupportedParameter
from deployments.protocol.content_blocks import ChatMessages
from deployments.protocol.messages import MessagesRequest


def read(*blocks: dict, role: str = "user") -> list[dict]:
    chat = ChatMessages()
    chat.add({"role": role, "content": list(blocks)}, "messages[0]")
    return chat.messages


def texts(messages: list[dict]) -> list[str]:
    return [part["text"] for part in messages[0]["content"]]


def test_the_model_is_shown_what_a_source_is():
    document = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "Grass is green."},
        "title": "Grass",
        "context": "From a book.",
        "citations": {"enabled": False},
    }
    assert texts(read(document)) == ["Grass\n", "From a book.\n", "Grass is green."]
    result = {
        "type": "search_result",
        "title": "Sky",
        "source": "https://sky.example",
        "content": [{"type": "text", "text": "It is blue."}],
    }
    assert texts(read(result)) == ["Sky\n", "https://sky.example\n", "It is blue."]


def test_sources_are_not_cited():
    block = {"type": "document", "source": {"type": "text", "data": "a"}, "citations": {"enabled": True}}
    with pytest.raises(UnsupportedParameter) as error:
        read(block)
    assert error.value.param == "messages[0].content[0].citations.enabled"


def test_a_message_may_hold_nothing_but_a_thought_that_nobody_can_read():
    assert read({"type": "redacted_thinking", "data": "x"}, role="assistant") == [
        {"role": "assistant", "content": []}
    ]


def test_fields_of_a_tool_that_are_no_part_of_its_function_are_not_shown_to_the_model():
    tool = {
        "type": "custom",
        "name": "report",
        "description": "Reports.",
        "input_schema": {"type": "object"},
        "input_examples": [{"a": 1}],
        "cache_control": {"type": "ephemeral"},
        "defer_loading": True,
        "heard_of_by_nobody": 1,
    }
    body = MessagesRequest.read({"model": "pocket", "messages": [], "max_tokens": 1, "tools": [tool]})
    (shown,) = body.tool_use().functions
    assert shown["function"].keys() == {"name", "description", "input_examples", "parameters"}
