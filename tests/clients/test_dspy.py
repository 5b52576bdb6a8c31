"""DSPy."""

import base64
from typing import Literal

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("dspy==3.4.1")

import dspy  # noqa: E402


class Describe(dspy.Signature):
    """Describe the picture."""

    picture: dspy.Image = dspy.InputField()
    color: Literal["red", "green", "blue"] = dspy.OutputField()
    shape: Literal["circle", "square", "star"] = dspy.OutputField()
    count: int = dspy.OutputField()


@pytest.fixture
def model(base_url):
    return dspy.LM(
        f"openai/{cases.MODEL}", api_base=base_url, api_key="EMPTY", temperature=0, max_tokens=64, cache=False
    )


def test_chat(model):
    (answer,) = model(cases.GREETING)
    assert cases.is_greeting(answer if isinstance(answer, str) else answer["text"])


def test_image(model):
    (answer,) = model(messages=[cases.question()])
    assert cases.is_caption(answer if isinstance(answer, str) else answer["text"])


def test_schema(model):
    """A signature, by an answer in JSON: ``pocket`` doesn't know the tags that DSPy asks for by default."""
    with dspy.context(lm=model, adapter=dspy.JSONAdapter()):
        picture = dspy.Image(f"data:image/png;base64,{base64.b64encode(cases.PNG).decode()}")
        found = dspy.Predict(Describe)(picture=picture)
    assert {"color": found.color, "shape": found.shape, "count": found.count} == cases.FACTS
