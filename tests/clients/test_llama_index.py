"""LlamaIndex."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like==0.4.0")

from llama_index.core.agent.workflow import FunctionAgent  # noqa: E402
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock  # noqa: E402
from llama_index.core.tools import FunctionTool  # noqa: E402
from llama_index.embeddings.openai_like import OpenAILikeEmbedding  # noqa: E402
from llama_index.llms.openai_like import OpenAILike  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402


@pytest.fixture
def model(base_url):
    return OpenAILike(
        model=cases.MODEL,
        api_base=base_url,
        api_key="EMPTY",
        temperature=0,
        max_retries=0,
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        context_window=1024,
    )


def asked(text: str = cases.QUESTION) -> ChatMessage:
    return ChatMessage(role="user", blocks=[ImageBlock(image=cases.PNG), TextBlock(text=text)])


def test_chat(model):
    answer = model.chat([ChatMessage(role="user", content=cases.GREETING)])
    assert cases.is_greeting(answer.message.content)


def test_image(model):
    assert cases.is_caption(model.chat([asked()]).message.content)


def test_stream(model):
    pieces = [chunk.delta for chunk in model.stream_chat([asked()])]
    assert cases.is_caption("".join(piece or "" for piece in pieces)) and len(pieces) > 1


def test_schema(model):
    assert model.as_structured_llm(Facts).chat([asked()]).raw == Facts(**cases.FACTS)


def test_tools(model):
    tool = FunctionTool.from_defaults(cases.report)
    answer = model.chat_with_tools([tool], chat_history=[asked(cases.REQUEST)])
    (call,) = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "report" and cases.is_right(call.tool_kwargs)


async def test_agent(model):
    agent = FunctionAgent(tools=[FunctionTool.from_defaults(cases.report)], llm=model)
    answer = await agent.run(asked(cases.REQUEST))
    assert cases.is_caption(str(answer)) and len(answer.tool_calls) == 1


def test_embeddings(base_url):
    embeddings = OpenAILikeEmbedding(model_name=cases.EMBEDDER, api_base=base_url, api_key="EMPTY")
    assert len(embeddings.get_text_embedding("A red circle.")) == 256


def test_completions(base_url):
    model = OpenAILike(model=cases.MODEL, api_base=base_url, api_key="EMPTY", max_tokens=4)
    assert model.complete("Three red").text
