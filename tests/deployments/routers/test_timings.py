"""``include_timings``: times and media in the usage of whole and streamed answers, at every endpoint."""

import base64
import io
import json

import pytest

from tests.deployments.pictures import ask, circle, square

STAGES = ["fetch_ms", "prepare_ms", "prompt_ms", "encode_ms", "queue_ms", "prefill_ms"]


def asked(path: str, images: list, **fields) -> dict:
    """A body for ``path`` that asks for a few tokens."""
    (message,) = ask("What color is the circle?", *images)
    body = {"model": "pocket", "messages": [message], "max_tokens": 6, "temperature": 0} | fields
    if path == "/v1/responses":
        parts = [
            {"type": "input_image", "image_url": part["image_url"]["url"]}
            if part["type"] == "image_url"
            else {"type": "input_text", "text": part["text"]}
            for part in message["content"]
        ]
        body["input"] = [{"role": "user", "content": parts}]
        body["max_output_tokens"] = body.pop("max_tokens")
        del body["messages"]
    if path == "/v1/messages":
        for part in message["content"]:
            if part["type"] == "image_url":
                data = part.pop("image_url")["url"].partition(",")[2]
                source = {"type": "base64", "media_type": "image/png", "data": data}
                part |= {"type": "image", "source": source}
    return body


async def usage_of(http, path: str, body: dict) -> dict:
    """The usage in an answer, or in the last event of a stream that has one."""
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json()["usage"]
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    found = [event.get("usage") or event.get("response", {}).get("usage") for event in events]
    return [usage for usage in found if usage][-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_an_answer_tells_the_times_of_its_stages_and_its_images(http, path, stream):
    images = [circle("red", (90, 131)), square("blue", (131, 90)), circle("red", (90, 131))]
    body = asked(path, images, include_timings=True, stream=stream, cache_salt=f"{path} {stream}")
    first = await usage_of(http, path, body)
    times = first["timings"]
    assert list(times) == [*STAGES, "first_token_ms", "per_token_ms", "total_ms"]
    assert sum(times[name] for name in ("prepare_ms", "encode_ms", "prefill_ms")) < times["first_token_ms"]
    assert 0 < times["first_token_ms"] < times["total_ms"]
    assert [(item["type"], item["width"], item["height"]) for item in first["media"]] == [
        ("image", 90, 131),
        ("image", 131, 90),
        ("image", 90, 131),
    ]
    assert all(item["tokens"] > 0 and not item["cached"] for item in first["media"])
    assert max(item["encode_ms"] for item in first["media"]) == times["encode_ms"]
    again = await usage_of(http, path, body)
    assert [item["cached"] for item in again["media"]] == [True, True, True]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_times_are_told_on_request_only(http, path, stream):
    body = asked(path, [], stream=stream)
    if path == "/v1/completions":
        del body["messages"]
        body["prompt"] = ["A red", "A blue circle"]
    if stream and path != "/v1/responses":
        body["stream_options"] = {"include_usage": True}
    assert not {"timings", "media"} & (await usage_of(http, path, body)).keys()
    timed = await usage_of(http, path, body | {"include_timings": True})
    assert list(timed["timings"])[:3] == ["prompt_ms", "queue_ms", "prefill_ms"]
    assert timed["media"] == []


async def test_a_stream_with_times_ends_with_its_usage_unasked(http):
    body = asked("/v1/chat/completions", [], stream=True, include_timings=True)
    usage = await usage_of(http, "/v1/chat/completions", body)
    assert usage["completion_tokens"] > 1 and usage["timings"]["per_token_ms"] > 0


async def test_a_cut_image_is_shown_with_a_note(http):
    whole = io.BytesIO()
    circle("red", (160, 120)).save(whole, "JPEG", quality=95)
    cut = whole.getvalue()[: int(len(whole.getvalue()) * 0.9)]
    for data, noted in ((whole.getvalue(), False), (cut, True)):
        body = asked("/v1/chat/completions", [circle("red")], include_timings=True)
        url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
        body["messages"][0]["content"][0]["image_url"]["url"] = url
        (item,) = (await usage_of(http, "/v1/chat/completions", body))["media"]
        assert (item["width"], item["height"]) == (160, 120)
        assert ("note" in item) == noted
        assert not noted or item["note"].startswith("The file ends too early")
