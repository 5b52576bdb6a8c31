"""Haystack."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("haystack-ai==3.4.1")

from haystack.components.agents import Agent  # noqa: E402
from haystack.components.embedders import OpenAITextEmbedder  # noqa: E402
from haystack.components.generators.chat import OpenAIChatGenerator  # noqa: E402
from haystack.dataclasses import ChatMessage, ImageContent  # noqa: E402
from haystack.tools import Tool  # noqa: E402
from haystack.utils import Secret  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402

KEY = Secret.from_token("EMPTY")
REPORT = Tool(
    name="report", description="Reports a picture.", parameters=cases.PARAMETERS, function=cases.report
)


@pytest.fixture
def generator(base_url):
    def generator(**options):
        settings = {"temperature": 0, **options.pop("generation_kwargs", {})}
        return OpenAIChatGenerator(
            api_key=KEY,
            model=cases.MODEL,
            api_base_url=base_url,
            generation_kwargs=settings,
            max_retries=0,
            **options,
        )

    return generator


def asked(text: str = cases.QUESTION) -> ChatMessage:
    image = ImageContent(base64_image=cases.BASE64, mime_type="image/png")
    return ChatMessage.from_user(content_parts=[image, text])


def test_chat(generator):
    (reply,) = generator().run([ChatMessage.from_user(cases.GREETING)])["replies"]
    assert cases.is_greeting(reply.text)


def test_image(generator):
    (reply,) = generator().run([asked()])["replies"]
    assert cases.is_caption(reply.text)


def test_stream(generator):
    pieces = []
    (reply,) = generator(streaming_callback=pieces.append).run([asked()])["replies"]
    assert cases.is_caption(reply.text) and len(pieces) > 1


def test_schema(generator):
    (reply,) = generator(generation_kwargs={"response_format": Facts}).run([asked()])["replies"]
    assert cases.is_right(reply.text)


def test_tools(generator):
    (reply,) = generator().run([asked(cases.REQUEST)], tools=[REPORT])["replies"]
    (call,) = reply.tool_calls
    assert call.tool_name == "report" and cases.is_right(call.arguments)


def test_agent(generator):
    agent = Agent(chat_generator=generator(), tools=[REPORT])
    messages = agent.run(messages=[asked(cases.REQUEST)])["messages"]
    assert cases.is_caption(messages[-1].text)


def test_embeddings(base_url):
    embedder = OpenAITextEmbedder(api_key=KEY, model=cases.EMBEDDER, api_base_url=base_url)
    assert len(embedder.run("A red circle.")["embedding"]) == 256
