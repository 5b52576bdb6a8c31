"""LangChain."""

import re

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("langchain==1.5.2", "langchain-openai==1.7.4")

from langchain.agents import create_agent  # noqa: E402
from langchain_core.messages import HumanMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from langchain_openai import ChatOpenAI, OpenAIEmbeddings, custom_tool  # noqa: E402
from pydantic import BaseModel  # noqa: E402

SUM = 'start: NUMBER (" + " NUMBER)+\nNUMBER: /[0-9]{1,2}/'


class Facts(BaseModel):
    """Content of an image."""

    color: str
    shape: str
    count: int


@pytest.fixture
def model(base_url):
    return ChatOpenAI(model=cases.MODEL, base_url=base_url, api_key="EMPTY", temperature=0, max_retries=0)


def asked(text: str = cases.QUESTION) -> HumanMessage:
    return HumanMessage(content=cases.question(text)["content"])


report = tool(cases.report)


def test_chat(model):
    assert cases.is_greeting(model.invoke(cases.GREETING).content)


async def test_chat_asynchronously(model):
    assert cases.is_greeting((await model.ainvoke(cases.GREETING)).content)


def test_image(model):
    answer = model.invoke([asked()])
    assert cases.is_caption(answer.content) and answer.usage_metadata["output_tokens"] > 3


def test_image_in_its_own_form(model):
    parts = [
        {"type": "image", "base64": cases.BASE64, "mime_type": "image/png"},
        {"type": "text", "text": cases.QUESTION},
    ]
    assert cases.is_caption(model.invoke([HumanMessage(content=parts)]).content)


def test_stream(model):
    pieces = [chunk.content for chunk in model.stream([asked()])]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_schema(model, method):
    found = model.with_structured_output(Facts, method=method).invoke([asked()])
    assert found == Facts(**cases.FACTS)


def test_tools(model):
    (call,) = model.bind_tools([report]).invoke([asked(cases.REQUEST)]).tool_calls
    assert call["name"] == "report" and cases.is_right(call["args"])


@custom_tool(format={"type": "grammar", "syntax": "lark", "definition": SUM})
def add(text: str) -> str:
    """Add numbers."""
    return str(sum(map(int, text.split(" + "))))


def test_tools_with_a_text_by_a_lark_grammar(base_url):
    """The call, whole and streamed, and its result."""
    model = ChatOpenAI(
        model=cases.MODEL, base_url=base_url, api_key="EMPTY", temperature=0, use_responses_api=True
    )
    asks = model.bind_tools([add], tool_choice="required", parallel_tool_calls=False)
    answer = asks.invoke(cases.GREETING)
    (call,) = answer.tool_calls
    assert call["name"] == "add" and re.fullmatch(r"\d{1,2}( \+ \d{1,2})+", call["args"]["__arg1"])
    first, *rest = asks.stream(cases.GREETING)
    assert sum(rest, first).tool_calls[0]["args"] == call["args"]
    messages = [HumanMessage(cases.GREETING), answer, add.invoke(call)]
    assert model.bind_tools([add]).invoke(messages).text


def test_agent(model):
    agent = create_agent(model, [report])
    messages = agent.invoke({"messages": [asked(cases.REQUEST)]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert cases.is_caption(messages[-1].content)


def test_embeddings(base_url):
    # By default the texts are cut into tokens of OpenAI's vocabulary, which would be downloaded.
    embeddings = OpenAIEmbeddings(
        model=cases.EMBEDDER, base_url=base_url, api_key="EMPTY", check_embedding_ctx_length=False
    )
    assert [len(vector) for vector in embeddings.embed_documents(["A red circle.", "Two stars."])] == [
        256
    ] * 2


def test_responses(base_url):
    model = ChatOpenAI(
        model=cases.MODEL, base_url=base_url, api_key="EMPTY", temperature=0, use_responses_api=True
    )
    assert cases.is_caption(model.invoke([asked()]).text)
    (call,) = model.bind_tools([report]).invoke([asked(cases.REQUEST)]).tool_calls
    assert cases.is_right(call["args"])
