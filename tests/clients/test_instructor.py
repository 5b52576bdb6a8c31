"""instructor."""

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("instructor==1.17.0")

import instructor  # noqa: E402
from openai import OpenAI  # noqa: E402

from tests.clients.facts import Facts  # noqa: E402


def client(base_url: str, mode: instructor.Mode):
    return instructor.from_openai(OpenAI(base_url=base_url, api_key="EMPTY", max_retries=0), mode=mode)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_schema(base_url, mode):
    found = client(base_url, mode).chat.completions.create(
        model=cases.MODEL, messages=[cases.question()], response_model=Facts, temperature=0
    )
    assert found.model_dump() == cases.FACTS


def test_schema_with_an_image_of_its_own(base_url):
    image = instructor.Image.from_base64(cases.DATA_URL)
    found = client(base_url, instructor.Mode.TOOLS).chat.completions.create(
        model=cases.MODEL,
        messages=[{"role": "user", "content": [image, cases.QUESTION]}],
        response_model=Facts,
        temperature=0,
    )
    assert found.model_dump() == cases.FACTS


def test_image(base_url):
    answer = client(base_url, instructor.Mode.TOOLS).chat.completions.create(
        model=cases.MODEL, messages=[cases.question()], response_model=None, temperature=0
    )
    assert cases.is_caption(answer.choices[0].message.content)


def test_stream(base_url):
    parts = list(
        client(base_url, instructor.Mode.TOOLS).chat.completions.create_partial(
            model=cases.MODEL, messages=[cases.question()], response_model=Facts, temperature=0
        )
    )
    assert parts[-1].model_dump() == cases.FACTS and len(parts) > 1
