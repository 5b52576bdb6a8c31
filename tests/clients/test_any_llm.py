"""any-llm."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("any-llm-sdk[openai]==1.40.2")

import any_llm  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402


@pytest.fixture
def address(base_url):
    return {"provider": "openai", "api_base": base_url, "api_key": "EMPTY"}


@pytest.fixture
def ask(address):
    def ask(*messages, **options):
        return any_llm.completion(
            model=cases.MODEL, messages=list(messages), temperature=0, **address, **options
        )

    return ask


def test_chat(ask):
    answer = ask({"role": "user", "content": cases.GREETING})
    assert cases.is_greeting(answer.choices[0].message.content)


def test_image(ask):
    assert cases.is_caption(ask(cases.question()).choices[0].message.content)


def test_stream(ask):
    pieces = [c.choices[0].delta.content or "" for c in ask(cases.question(), stream=True) if c.choices]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


def test_schema(ask):
    answer = ask(cases.question(), response_format=Facts)
    assert cases.is_right(answer.choices[0].message.content)


def test_tools(ask):
    (call,) = ask(cases.question(cases.REQUEST), tools=[cases.report]).choices[0].message.tool_calls
    assert call.function.name == "report" and cases.is_right(call.function.arguments)


def test_agent(ask):
    question = cases.question(cases.REQUEST)
    message = ask(question, tools=[cases.report]).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "saved"}
    end = ask(question, message.model_dump(exclude_none=True), result, tools=[cases.report])
    assert cases.is_caption(end.choices[0].message.content)


def test_embeddings(address):
    made = any_llm.embedding(model=cases.EMBEDDER, inputs=["A red circle."], **address)
    assert len(made.data[0].embedding) == 256


def test_responses(address):
    made = any_llm.responses(model=cases.MODEL, input_data=cases.GREETING, **address)
    assert cases.is_greeting(made.output_text)
