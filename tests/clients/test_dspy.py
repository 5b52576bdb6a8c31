"""DSPy."""

from typing import Literal

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("dspy==3.4.1")

import dspy  # noqa: E402
from dspy import lm15  # noqa: E402


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


def test_schema(base_url):
    """A signature, by an answer that a schema constrains: DSPy must be told that the server has schemas."""
    access = lm15.AccessPolicy(provider="sightline", base_url=base_url, env_keys=("SIGHTLINE_KEY",))
    lm15.register_provider(
        lm15.ProviderDefinition.chat(access, compat=lm15.OpenAIChatCompat()),
        supports=lm15.ModelSupport(function_calling=True, response_schema=True),
        replace=True,
    )
    model = dspy.LM(f"sightline/{cases.MODEL}", api_key="EMPTY", temperature=0, max_tokens=64, cache=False)
    with dspy.context(lm=model, adapter=dspy.JSONAdapter()):
        found = dspy.Predict(Describe)(picture=dspy.Image(cases.DATA_URL))
    # The small model doesn't count right after DSPy's long instructions.
    assert (found.color, found.shape) == ("red", "circle") and isinstance(found.count, int)
