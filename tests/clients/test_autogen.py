"""AutoGen."""

import io

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("autogen-agentchat==0.7.5", "autogen-ext[openai]==0.7.5", "pillow==13.0.0")

import PIL.Image  # noqa: E402
from autogen_agentchat.agents import AssistantAgent  # noqa: E402
from autogen_agentchat.messages import MultiModalMessage, TextMessage  # noqa: E402
from autogen_core import Image  # noqa: E402
from autogen_ext.models.openai import OpenAIChatCompletionClient  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402

ABLE = {
    "vision": True,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
}


@pytest.fixture
def agent(base_url):
    def agent(**options):
        client = OpenAIChatCompletionClient(
            model=cases.MODEL,
            base_url=base_url,
            api_key="EMPTY",
            temperature=0,
            max_retries=0,
            model_info=ABLE,
        )
        return AssistantAgent("eye", client, system_message=None, **options)

    return agent


def asked(text: str = cases.QUESTION) -> MultiModalMessage:
    return MultiModalMessage(content=[Image(PIL.Image.open(io.BytesIO(cases.PNG))), text], source="user")


async def test_chat(agent):
    made = await agent().run(task=TextMessage(content=cases.GREETING, source="user"))
    assert cases.is_greeting(made.messages[-1].content)


async def test_image(agent):
    assert cases.is_caption((await agent().run(task=asked())).messages[-1].content)


async def test_stream(agent):
    events = [event async for event in agent(model_client_stream=True).run_stream(task=asked())]
    pieces = [event.content for event in events if type(event).__name__ == "ModelClientStreamingChunkEvent"]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


async def test_schema(agent):
    made = await agent(output_content_type=Facts).run(task=asked())
    assert made.messages[-1].content == Facts(**cases.FACTS)


async def test_agent(agent):
    made = await agent(tools=[cases.report], reflect_on_tool_use=True).run(task=asked(cases.REQUEST))
    _, calls, results, answer = made.messages
    assert [cases.is_right(call.arguments) for call in calls.content] == [True]
    assert [result.content for result in results.content] == ["saved"]
    assert cases.is_caption(answer.content)
