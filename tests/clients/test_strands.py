"""Strands Agents."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("strands-agents[openai]==1.62.0")

from strands import Agent, tool  # noqa: E402
from strands.models.openai import OpenAIModel  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402


@pytest.fixture
def agent(base_url):
    def agent(**options):
        client = {"api_key": "EMPTY", "base_url": base_url, "max_retries": 0}
        model = OpenAIModel(client_args=client, model_id=cases.MODEL, params={"temperature": 0})
        return Agent(model=model, callback_handler=None, **options)

    return agent


def asked(text: str = cases.QUESTION) -> list[dict]:
    return [{"image": {"format": "png", "source": {"bytes": cases.PNG}}}, {"text": text}]


def test_chat(agent):
    assert cases.is_greeting(str(agent()(cases.GREETING)))


def test_image(agent):
    made = agent()(asked())
    assert cases.is_caption(str(made)) and made.metrics.accumulated_usage["outputTokens"] > 3


async def test_stream(agent):
    pieces = [event["data"] async for event in agent().stream_async(asked()) if "data" in event]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


def test_schema(agent):
    made = agent()(asked(), structured_output_model=Facts)
    assert made.structured_output == Facts(**cases.FACTS)


def test_agent(agent):
    results = []

    def report(color: str, shape: str, count: int) -> str:
        results.append(cases.report(color, shape, count))
        return results[-1]

    report.__doc__ = cases.report.__doc__
    made = agent(tools=[tool(report)])(asked(cases.REQUEST))
    assert results == ["saved"] and cases.is_caption(str(made))
