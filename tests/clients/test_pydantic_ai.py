"""Pydantic AI."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("pydantic-ai-slim[openai]==2.68.0")

from pydantic_ai import Agent, BinaryContent, NativeOutput  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402

PICTURE = BinaryContent(data=cases.PNG, media_type="image/png")


@pytest.fixture
def provider(base_url):
    return OpenAIProvider(base_url=base_url, api_key="EMPTY")


@pytest.fixture
def model(provider):
    return OpenAIChatModel(cases.MODEL, provider=provider, settings={"temperature": 0})


async def test_chat(model):
    assert cases.is_greeting((await Agent(model).run(cases.GREETING)).output)


async def test_image(model):
    assert cases.is_caption((await Agent(model).run([PICTURE, cases.QUESTION])).output)


async def test_stream(model):
    async with Agent(model).run_stream([PICTURE, cases.QUESTION]) as answer:
        pieces = [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]
    assert cases.is_caption("".join(pieces))


async def test_schema(model):
    made = await Agent(model, output_type=NativeOutput(Facts)).run([PICTURE, cases.QUESTION])
    assert made.output == Facts(**cases.FACTS)


async def test_schema_by_a_tool(model):
    made = await Agent(model, output_type=Facts).run([PICTURE, cases.QUESTION])
    assert made.output == Facts(**cases.FACTS)


async def test_agent(model):
    called = []

    def report(color: str, shape: str, count: int) -> str:
        """Report a picture."""
        called.append((color, shape, count))
        return "saved"

    made = await Agent(model, tools=[report]).run([PICTURE, cases.REQUEST])
    assert called == [tuple(cases.FACTS.values())] and cases.is_caption(made.output)


async def test_responses(provider):
    model = OpenAIResponsesModel(cases.MODEL, provider=provider, settings={"temperature": 0})
    made = await Agent(model, tools=[cases.report]).run([PICTURE, cases.REQUEST])
    assert cases.is_caption(made.output)
