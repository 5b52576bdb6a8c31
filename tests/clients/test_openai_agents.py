"""OpenAI Agents SDK."""

from functools import partial

import pytest
import pytest_asyncio

from tests.clients import cases
from tests.clients.environment import needs

needs("openai-agents==0.24.0")

from agents import (  # noqa: E402
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402

set_tracing_disabled(True)


@pytest_asyncio.fixture
async def client(base_url):
    async with AsyncOpenAI(base_url=base_url, api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture
def agent(client):
    model = OpenAIChatCompletionsModel(model=cases.MODEL, openai_client=client)
    return partial(Agent, name="eye", model=model, model_settings=ModelSettings(temperature=0))


def asked(text: str) -> list[dict]:
    parts = [
        {"type": "input_image", "image_url": cases.DATA_URL, "detail": "auto"},
        {"type": "input_text", "text": text},
    ]
    return [{"role": "user", "content": parts}]


async def test_chat(agent):
    assert cases.is_greeting((await Runner.run(agent(), cases.GREETING)).final_output)


async def test_image(agent):
    assert cases.is_caption((await Runner.run(agent(), asked(cases.QUESTION))).final_output)


async def test_stream(agent):
    answer = Runner.run_streamed(agent(), asked(cases.QUESTION))
    kinds = [event.data.type async for event in answer.stream_events() if event.type == "raw_response_event"]
    assert kinds.count("response.output_text.delta") > 0 and cases.is_caption(answer.final_output)


async def test_schema(agent):
    made = await Runner.run(agent(output_type=Facts), asked(cases.QUESTION))
    assert made.final_output == Facts(**cases.FACTS)


async def test_schema_behind_a_required_call(agent):
    """The SDK sends the form with both turns, and lets the model choose in the second."""
    settings = ModelSettings(temperature=0, max_tokens=100, tool_choice="required", parallel_tool_calls=False)
    made = await Runner.run(
        agent(output_type=Facts, tools=[function_tool(cases.report)], model_settings=settings),
        asked(cases.REQUEST),
    )
    assert made.new_items[0].type == "tool_call_item" and isinstance(made.final_output, Facts)


async def check_loop(agent):
    made = await Runner.run(agent(tools=[function_tool(cases.report)]), asked(cases.REQUEST))
    kinds = [item.type for item in made.new_items]
    assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert made.new_items[1].output == "saved" and cases.is_caption(made.final_output)


async def test_agent(agent):
    await check_loop(agent)


async def test_responses(client):
    model = OpenAIResponsesModel(model=cases.MODEL, openai_client=client)
    await check_loop(partial(Agent, name="eye", model=model, model_settings=ModelSettings(temperature=0)))
