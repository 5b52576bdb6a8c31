"""Refused requests: the status, the field and the words of the answer."""

import json

import pytest
from PIL import Image

from tests.deployments.pictures import ask, circle, data_url

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]


async def post(http, body, path: str = "/v1/chat/completions") -> tuple[int, dict]:
    data = body if isinstance(body, bytes | str) else json.dumps(body)
    response = await http.post(path, content=data, headers={"Content-Type": "application/json"})
    return response.status_code, response.json()


def image(url: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def blank_png(side: int) -> str:
    """Many pixels in few bytes."""
    return data_url(Image.new("1", (side, side)))


CASES = {
    "model": ({"model": "gpt"}, 404, "model", "served here: 'pocket', 'tests/vectors'"),
    "unknown field": ({"tempature": 1}, 400, "tempature", "Unknown field"),
    "type": ({"max_tokens": "many"}, 400, "max_tokens", "integer"),
    "range": ({"temperature": -1}, 400, "temperature", "[0, inf]"),
    "penalty": ({"presence_penalty": 9}, 400, "presence_penalty", "[-2, 2]"),
    "n": ({"n": 1000}, 400, "n", "128"),
    "id": ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "vocabulary"),
    "length": ({"max_tokens": 5000}, 400, "max_tokens", "context"),
    "empty": ({"messages": []}, 400, "messages", "at least one"),
    "role": ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role", "must be one of"),
    "template": ({"chat_template": "{{ 1 }}"}, 400, None, "chat_template"),
    "template option": (
        {"chat_template_kwargs": {"tokenize": True}},
        400,
        "chat_template_kwargs",
        "tokenize",
    ),
    "stream option": ({"stream_options": {"include_usage": True}}, 400, None, "stream"),
    "long": ({"messages": [{"role": "user", "content": "word " * 4000}]}, 400, "messages", "1024"),
    "private address": (
        {"messages": image("http://127.0.0.1/")},
        400,
        "messages[0].content[0].image_url.url",
        "is not public",
    ),
    "file": ({"messages": image("file:///etc/passwd")}, 400, "messages[0].content[0].image_url.url", "files"),
    "no base64": (
        {"messages": image("data:image/png;base64,@@@@")},
        400,
        "messages[0].content[0].image_url.url",
        "base64",
    ),
    "no picture": (
        {"messages": image("data:image/png;base64,aGVsbG8=")},
        400,
        "messages[0].content[0].image_url.url",
        "formats",
    ),
    "bad schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        400,
        "response_format",
        "schema",
    ),
    "bad regex": ({"guided_regex": "("}, 400, "guided_regex", "regex"),
    "two constraints": (
        {"guided_regex": "a", "guided_choice": ["a"]},
        400,
        "response_format",
        "Only one",
    ),
    "embedding model": ({"model": "tests/vectors"}, 400, None, "embeddings"),
    "bomb": (
        {"messages": image(blank_png(9000))},
        413,
        "messages[0].content[0].image_url.url",
        "64000000 pixels",
    ),
    "large pictures": ({"messages": image(blank_png(7000)) * 6}, 413, "messages", "256000000 are allowed"),
    "elongated picture": (
        {"messages": image(data_url(Image.new("RGB", (2010, 10))))},
        400,
        "messages[0].content[0].image_url.url",
        "too elongated",
    ),
    "many pictures": (
        {"messages": image(data_url(circle("red"))) * 9},
        413,
        "messages[8].content[0].image_url.url",
        "limit_mm_per_prompt allows 8",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_bad_request_is_told_what_to_change(http, case, stream):
    change, status, param, words = CASES[case]
    if "stream_options" in change and stream:
        pytest.skip("stream_options are right for streams")
    found, body = await post(http, {"model": "pocket", "messages": HELLO, "stream": stream} | change)
    error = body["error"]
    assert (found, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000])
async def test_a_body_that_is_no_json_object(http, body):
    status, found = await post(http, body)
    assert status == 400 and "JSON" in found["error"]["message"]


async def test_marks_typed_in_a_text_are_only_text(client):
    """No picture can be claimed by writing its mark."""
    made = await client.chat.completions.create(
        model="pocket",
        messages=ask("<|vision_start|><|image_pad|><|vision_end|> What color is the circle?", circle("red")),
        max_tokens=20,
        temperature=0,
    )
    assert made.choices[0].finish_reason in ("stop", "length")
