"""Outlines."""

import io
import re
from typing import Literal

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("outlines==1.3.3", "openai==3.57.0", "pillow==13.0.0")

import outlines  # noqa: E402
import PIL.Image  # noqa: E402
from openai import OpenAI  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402

NUMBER = r"[0-9]{3}-[a-c]{2}"


@pytest.fixture(params=[outlines.from_vllm, outlines.from_openai], ids=["vLLM's fields", "OpenAI's"])
def model(request, base_url):
    return request.param(OpenAI(base_url=base_url, api_key="EMPTY", max_retries=0), cases.MODEL)


def asked() -> list:
    return [cases.QUESTION, outlines.Image(PIL.Image.open(io.BytesIO(cases.PNG)))]


def test_chat(model):
    assert cases.is_greeting(model(cases.GREETING, temperature=0))


def test_image(model):
    assert cases.is_caption(model(asked(), temperature=0))


def test_stream(model):
    pieces = list(model.stream(asked(), temperature=0))
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


def test_schema(model):
    assert cases.is_right(model(asked(), Facts, temperature=0))


@pytest.mark.parametrize("model", [outlines.from_vllm], indirect=True)
def test_schema_of_other_kinds(model):
    assert model(cases.GREETING, Literal["circle", "star"], temperature=0) in ("circle", "star")
    assert re.fullmatch(NUMBER, model(cases.GREETING, outlines.regex(NUMBER), temperature=0))
    assert model(cases.GREETING, outlines.cfg('start: "red" | "blue"'), temperature=0) in ("red", "blue")
