"""mistralai."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("mistralai==3.7.0")

from mistralai.client import Mistral  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402


@pytest.fixture
def client(root):
    with Mistral(api_key="EMPTY", server_url=root) as client:
        yield client


def asked(text: str = cases.QUESTION) -> dict:
    # An address without an object around it is a form of Mistral's own.
    parts = [{"type": "image_url", "image_url": cases.DATA_URL}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def options(*messages, **more) -> dict:
    return {"model": cases.MODEL, "messages": list(messages), "temperature": 0, **more}


def test_chat(client):
    made = client.chat.complete(**options({"role": "user", "content": cases.GREETING}))
    assert cases.is_greeting(made.choices[0].message.content)


def test_chat_with_a_prefix(client):
    begun = {"role": "assistant", "content": "Three", "prefix": True}
    made = client.chat.complete(**options(asked(), begun))
    assert made.choices[0].message.content == " red circles on a white background."


def test_image(client):
    assert cases.is_caption(client.chat.complete(**options(asked())).choices[0].message.content)


def test_stream(client):
    events = list(client.chat.stream(**options(asked())))
    pieces = [event.data.choices[0].delta.content or "" for event in events]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


def test_schema(client):
    made = client.chat.parse(**options(asked()), response_format=Facts)
    assert made.choices[0].message.parsed == Facts(**cases.FACTS)


def test_agent(client):
    question, tools = asked(cases.REQUEST), [cases.TOOL]
    made = client.chat.complete(**options(question, tools=tools, tool_choice="any")).choices[0].message
    (call,) = made.tool_calls
    assert call.function.name == "report" and cases.is_right(call.function.arguments)
    result = {"role": "tool", "name": "report", "content": "saved", "tool_call_id": call.id}
    end = client.chat.complete(**options(question, made, result, tools=tools))
    assert cases.is_caption(end.choices[0].message.content)


def test_embeddings(client):
    made = client.embeddings.create(model=cases.EMBEDDER, inputs=["A red circle.", "Two stars."])
    assert [len(entry.embedding) for entry in made.data] == [256, 256]
