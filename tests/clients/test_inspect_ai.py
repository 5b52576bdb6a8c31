"""Inspect AI."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("inspect-ai==0.3.285", "openai==3.57.0")

from inspect_ai import Task, eval  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import includes  # noqa: E402
from inspect_ai.solver import generate, use_tools  # noqa: E402
from inspect_ai.tool import tool  # noqa: E402
from inspect_ai.util import json_schema  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402


@pytest.fixture
def model(base_url):
    config = GenerateConfig(temperature=0, max_retries=0)
    return get_model(f"openai-api/sightline/{cases.MODEL}", base_url=base_url, api_key="EMPTY", config=config)


def asked(text: str = cases.QUESTION) -> list[ChatMessageUser]:
    return [ChatMessageUser(content=[ContentImage(image=cases.DATA_URL), ContentText(text=text)])]


@tool
def report():
    async def execute(color: str, shape: str, count: int) -> str:
        """Report a picture.

        Args:
            color: the color of the shapes
            shape: the kind of the shapes
            count: how many shapes there are
        """
        return cases.report(color, shape, count)

    return execute


async def test_chat(model):
    assert cases.is_greeting((await model.generate(cases.GREETING)).completion)


async def test_image(model):
    assert cases.is_caption((await model.generate(asked())).completion)


async def test_schema(model):
    schema = ResponseSchema(name="facts", json_schema=json_schema(Facts))
    answer = await model.generate(asked(), config=GenerateConfig(response_schema=schema))
    assert cases.is_right(answer.completion)


async def test_tools(model):
    answer = await model.generate(asked(cases.REQUEST), tools=[report()])
    (call,) = answer.message.tool_calls
    assert call.function == "report" and cases.is_right(call.arguments)


def test_agent(model, tmp_path):
    """An evaluation of two samples, one of which takes a tool."""
    samples = [
        Sample(input=asked(text), target="hree red circles") for text in (cases.QUESTION, cases.REQUEST)
    ]
    task = Task(dataset=samples, solver=[use_tools(report()), generate()], scorer=includes())
    (log,) = eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success" and log.results.scores[0].metrics["accuracy"].value == 1.0
