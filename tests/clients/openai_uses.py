"""Uses of openai-python, the same since its first major version."""

import json

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.clients import cases


@pytest.fixture
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key="EMPTY", max_retries=0)


def ask(client: OpenAI, *messages, **options):
    return client.chat.completions.create(
        model=cases.MODEL, messages=list(messages), temperature=0, **options
    )


def test_chat(client):
    answer = ask(client, {"role": "user", "content": cases.GREETING})
    assert cases.is_greeting(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.total_tokens > 0


async def test_chat_asynchronously(base_url):
    async with AsyncOpenAI(base_url=base_url, api_key="EMPTY", max_retries=0) as client:
        answer = await ask(client, {"role": "user", "content": cases.GREETING})
    assert cases.is_greeting(answer.choices[0].message.content)


def test_image(client):
    assert cases.is_caption(ask(client, cases.question()).choices[0].message.content)


def test_stream(client):
    chunks = list(ask(client, cases.question(), stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert cases.is_caption("".join(piece or "" for piece in pieces)) and len(pieces) > 1
    assert chunks[-1].usage.completion_tokens > 3


def test_schema(client):
    form = {"name": "facts", "schema": cases.PARAMETERS, "strict": True}
    answer = ask(client, cases.question(), response_format={"type": "json_schema", "json_schema": form})
    assert cases.is_right(answer.choices[0].message.content)


def test_tools(client):
    answer = ask(client, cases.question(cases.REQUEST), tools=[cases.TOOL])
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and call.function.name == "report"
    assert cases.is_right(call.function.arguments)


def test_tools_in_a_stream(client):
    chunks = list(ask(client, cases.question(cases.REQUEST), tools=[cases.TOOL], stream=True))
    calls = [call for c in chunks if c.choices for call in c.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.function.name] == ["report"]
    assert cases.is_right("".join(call.function.arguments or "" for call in calls))


def test_tools_left_alone(client):
    answer = ask(client, cases.question(), tools=[cases.TOOL])
    assert cases.is_caption(answer.choices[0].message.content) and not answer.choices[0].message.tool_calls


def test_agent(client):
    messages = [cases.question(cases.REQUEST)]
    made = ask(client, *messages, tools=[cases.TOOL]).choices[0].message
    messages.append(made.model_dump(exclude_none=True))
    for call in made.tool_calls:
        result = cases.report(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert cases.is_caption(ask(client, *messages, tools=[cases.TOOL]).choices[0].message.content)


def test_embeddings(client):
    made = client.embeddings.create(model=cases.EMBEDDER, input=["A red circle.", "Two stars."])
    assert [len(entry.embedding) for entry in made.data] == [256, 256]


def test_completions(client):
    made = client.completions.create(model=cases.MODEL, prompt="Three red", max_tokens=4)
    assert made.choices[0].text and made.usage.completion_tokens


def test_models(client):
    assert cases.MODEL in [model.id for model in client.models.list()]
