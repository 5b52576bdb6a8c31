"""LiteLLM's SDK."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("litellm==1.110.2")

import litellm  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402


@pytest.fixture(params=["hosted_vllm", "openai"])
def provider(request):
    return request.param


@pytest.fixture
def ask(base_url, provider):
    def ask(*messages, **options):
        return litellm.completion(
            f"{provider}/{cases.MODEL}",
            messages=list(messages),
            api_base=base_url,
            api_key="EMPTY",
            temperature=0,
            max_retries=0,
            **options,
        )

    return ask


def test_chat(ask):
    answer = ask({"role": "user", "content": cases.GREETING})
    assert cases.is_greeting(answer.choices[0].message.content)


def test_image(ask):
    assert cases.is_caption(ask(cases.question()).choices[0].message.content)


def test_stream(ask):
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(cases.question(), stream=True)]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


def test_schema(ask):
    answer = ask(cases.question(), response_format=Facts)
    assert cases.is_right(answer.choices[0].message.content)


def test_tools(ask):
    (call,) = ask(cases.question(cases.REQUEST), tools=[cases.TOOL]).choices[0].message.tool_calls
    assert call.function.name == "report" and cases.is_right(call.function.arguments)


def test_agent(ask):
    question = cases.question(cases.REQUEST)
    message = ask(question, tools=[cases.TOOL]).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "saved"}
    end = ask(question, message.model_dump(), result, tools=[cases.TOOL])
    assert cases.is_caption(end.choices[0].message.content)


def test_chat_beyond_the_context(ask):
    """Its error is the one by which LiteLLM falls back on a model of longer context."""
    with pytest.raises(litellm.ContextWindowExceededError):
        ask({"role": "user", "content": "red " * 4000})


def test_embeddings(base_url, provider):
    made = litellm.embedding(
        f"{provider}/{cases.EMBEDDER}", input=["A red circle."], api_base=base_url, api_key="EMPTY"
    )
    assert len(made.data[0]["embedding"]) == 256


def test_responses(base_url):
    made = litellm.responses(
        input=cases.GREETING, model=f"openai/{cases.MODEL}", api_base=base_url, api_key="EMPTY"
    )
    assert cases.is_greeting(made.output[-1].content[0].text)


def test_completions(base_url):
    made = litellm.text_completion(
        model=f"text-completion-openai/{cases.MODEL}",
        prompt="Three red",
        max_tokens=4,
        api_base=base_url,
        api_key="EMPTY",
    )
    assert made.choices[0].text
