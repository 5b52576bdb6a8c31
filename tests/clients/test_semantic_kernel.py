"""Semantic Kernel."""

import pytest_asyncio

from tests.clients import cases
from tests.clients.environment import needs

needs("semantic-kernel==1.45.0")

from openai import AsyncOpenAI  # noqa: E402
from semantic_kernel import Kernel  # noqa: E402
from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior  # noqa: E402
from semantic_kernel.connectors.ai.open_ai import (  # noqa: E402
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
    OpenAITextEmbedding,
)
from semantic_kernel.contents import (  # noqa: E402
    ChatHistory,
    ChatMessageContent,
    ImageContent,
    TextContent,
)
from semantic_kernel.functions import kernel_function  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402


class Reports:
    @kernel_function(name="report", description="Reports a picture.")
    def report(self, color: str, shape: str, count: int) -> str:
        return cases.report(color, shape, count)


@pytest_asyncio.fixture
async def client(base_url):
    async with AsyncOpenAI(base_url=base_url, api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest_asyncio.fixture
async def service(client):
    return OpenAIChatCompletion(ai_model_id=cases.MODEL, async_client=client)


def settings(**options) -> OpenAIChatPromptExecutionSettings:
    return OpenAIChatPromptExecutionSettings(temperature=0, **options)


def asked(text: str = cases.QUESTION) -> ChatHistory:
    parts = [ImageContent(data_uri=cases.DATA_URL), TextContent(text=text)]
    return ChatHistory(messages=[ChatMessageContent(role="user", items=parts)])


async def test_chat(service):
    history = ChatHistory()
    history.add_user_message(cases.GREETING)
    assert cases.is_greeting(str(await service.get_chat_message_content(history, settings())))


async def test_image(service):
    assert cases.is_caption(str(await service.get_chat_message_content(asked(), settings())))


async def test_stream(service):
    stream = service.get_streaming_chat_message_contents(asked(), settings())
    pieces = [str(each[0]) async for each in stream]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


async def test_schema(service):
    made = await service.get_chat_message_content(asked(), settings(response_format=Facts))
    assert cases.is_right(str(made))


async def test_agent(service):
    kernel, history = Kernel(), asked(cases.REQUEST)
    kernel.add_plugin(Reports(), "pictures")
    options = settings(function_choice_behavior=FunctionChoiceBehavior.Auto())
    made = await service.get_chat_message_content(history, options, kernel=kernel)
    results = [item.result for message in history for item in message.items if hasattr(item, "result")]
    assert results == ["saved"] and cases.is_caption(str(made))


async def test_embeddings(client):
    made = await OpenAITextEmbedding(cases.EMBEDDER, async_client=client).generate_embeddings(
        ["A red circle."]
    )
    assert made.shape == (1, 256)
