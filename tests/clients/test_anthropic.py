"""anthropic."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("anthropic==2.14.0")

from anthropic import Anthropic  # noqa: E402

FUNCTION = cases.TOOL["function"]
TOOL = {"name": "report", "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}


@pytest.fixture
def client(root):
    return Anthropic(base_url=root, api_key="EMPTY", max_retries=0)


def asked(text: str = cases.QUESTION) -> dict:
    source = {"type": "base64", "media_type": "image/png", "data": cases.BASE64}
    return {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": text}]}


def options(*messages, **more):
    return {
        "model": cases.MODEL,
        "messages": list(messages),
        "max_tokens": 64,
        "extra_body": {"temperature": 0},
        **more,
    }


def test_chat(client):
    made = client.messages.create(**options({"role": "user", "content": cases.GREETING}))
    assert cases.is_greeting(made.content[0].text)


def test_image(client):
    assert cases.is_caption(client.messages.create(**options(asked())).content[0].text)


def test_stream(client):
    with client.messages.stream(**options(asked())) as stream:
        pieces = list(stream.text_stream)
    assert cases.is_caption("".join(pieces))


def test_tools(client):
    made = client.messages.create(**options(asked(cases.REQUEST), tools=[TOOL]))
    (use,) = [block for block in made.content if block.type == "tool_use"]
    assert use.name == "report" and cases.is_right(use.input) and made.stop_reason == "tool_use"


def test_agent(client):
    question = asked(cases.REQUEST)
    made = client.messages.create(**options(question, tools=[TOOL]))
    (use,) = [block for block in made.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": cases.report(**use.input)}
    answer = {"role": "assistant", "content": made.content}
    end = client.messages.create(
        **options(question, answer, {"role": "user", "content": [result]}, tools=[TOOL])
    )
    assert cases.is_caption(end.content[0].text)
