"""smolagents."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("smolagents[openai]==1.26.0")

from smolagents import OpenAIModel, tool  # noqa: E402
from smolagents.models import ChatMessage, MessageRole  # noqa: E402


@pytest.fixture
def model(base_url):
    return OpenAIModel(model_id=cases.MODEL, api_base=base_url, api_key="EMPTY", temperature=0)


def asked(text: str, *, image: bool = True) -> ChatMessage:
    parts = cases.question(text)["content"] if image else [{"type": "text", "text": text}]
    return ChatMessage(role=MessageRole.USER, content=parts)


def test_chat(model):
    assert cases.is_greeting(model.generate([asked(cases.GREETING, image=False)]).content)


def test_image(model):
    assert cases.is_caption(model.generate([asked(cases.QUESTION)]).content)


def test_stream(model):
    pieces = [delta.content or "" for delta in model.generate_stream([asked(cases.QUESTION)])]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


def test_tools(model):
    answer = model.generate([asked(cases.REQUEST)], tools_to_call_from=[tool(cases.report)])
    (call,) = answer.tool_calls
    assert call.function.name == "report" and cases.is_right(call.function.arguments)
