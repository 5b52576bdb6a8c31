"""Agno."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("agno==3.1.10", "openai==3.57.0")

from agno.agent import Agent  # noqa: E402
from agno.knowledge.embedder.openai import OpenAIEmbedder  # noqa: E402
from agno.media import Image  # noqa: E402
from agno.models.openai import OpenAIResponses  # noqa: E402
from agno.models.openai.like import OpenAILike  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402

PICTURE = [Image(content=cases.PNG)]


@pytest.fixture
def agent(base_url):
    def agent(model=OpenAILike, **options):
        served = model(id=cases.MODEL, api_key="EMPTY", base_url=base_url, temperature=0, max_retries=0)
        return Agent(model=served, telemetry=False, **options)

    return agent


def test_chat(agent):
    assert cases.is_greeting(agent().run(cases.GREETING).content)


def test_image(agent):
    assert cases.is_caption(agent().run(cases.QUESTION, images=PICTURE).content)


def test_stream(agent):
    events = list(agent().run(cases.QUESTION, images=PICTURE, stream=True))
    pieces = [event.content or "" for event in events]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


def test_schema(agent):
    made = agent(output_schema=Facts).run(cases.QUESTION, images=PICTURE)
    assert made.content == Facts(**cases.FACTS)


def check_loop(agent):
    made = agent.run(cases.REQUEST, images=PICTURE)
    assert [call.result for call in made.tools] == ["saved"] and cases.is_caption(made.content)


def test_agent(agent):
    check_loop(agent(tools=[cases.report]))


def test_responses(agent):
    check_loop(agent(OpenAIResponses, tools=[cases.report]))


def test_embeddings(base_url):
    embedder = OpenAIEmbedder(id=cases.EMBEDDER, api_key="EMPTY", base_url=base_url, dimensions=64)
    assert len(embedder.get_embedding("A red circle.")) == 64
