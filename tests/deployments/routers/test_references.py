"""Media by reference over HTTP: the ``uuid`` of a part in place of its content."""

import httpx
import pytest
import pytest_asyncio

from deployments.api import create_api
from deployments.config import IngressConfig
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import circle, data_url, square
from tests.deployments.routers.test_videos import RED, data

pytestmark = pytest.mark.usefixtures("idle_afterwards")

KEYS = [
    {"name": "one", "key": "first"},
    {"name": "two", "key": "second"},
    # A shared cache of content that callers must have; a uuid can be guessed.
    {"name": "sharing", "key": "third", "own_cache": False},
]


@pytest_asyncio.fixture(loop_scope="session")
async def post(running):
    """Sends a conversation about a part; gives the response."""
    api = create_api(IngressConfig(keys=KEYS), running.app.api.state.pipelines)
    http = httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60)

    async def send(part: dict, key: str = "first", path: str = "/v1/chat/completions", **fields):
        text = {"type": "text", "text": "What color is the circle?"}
        body = {"model": "pocket", "messages": [{"role": "user", "content": [part, text]}]}
        if path == "/v1/chat/completions":
            body |= {"temperature": 0, "max_tokens": 8, "include_timings": True}
        return await http.post(path, json=body | fields, headers={"Authorization": f"Bearer {key}"})

    return send


def image(uuid: str | None, picture=None, **detail) -> dict:
    value = None if picture is None else {"url": data_url(picture), **detail}
    return {"type": "image_url", "image_url": value, "uuid": uuid}


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def refusal(response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


async def test_a_uuid_stands_for_the_image_that_came_with_it(post):
    first = await post(image("circle", circle("purple")))
    again = await post(image("circle"))
    assert "purple" in text_of(first) and text_of(again) == text_of(first)
    assert first.json()["usage"]["prompt_tokens"] == again.json()["usage"]["prompt_tokens"]
    (seen,) = again.json()["usage"]["media"]
    assert (seen["width"], seen["height"], seen["cached"]) == (200, 160, True)
    # Every way in which clients write that there is no content.
    for part in (
        {"type": "image_url", "uuid": "circle"},
        {"type": "image_url", "image_url": {"url": None}, "uuid": "circle"},
        {"type": "input_image", "uuid": "circle"},
    ):
        assert text_of(await post(part)) == text_of(first)
    counts = [
        (await post(part, path="/tokenize")).json()["count"]
        for part in (image("circle"), image(None, circle("purple")))
    ]
    assert counts[0] == counts[1]


async def test_a_reference_is_prepared_as_its_own_request_asks(post):
    picture = circle("red", (640, 480))
    await post(image("large", picture))
    options = {"mm_processor_kwargs": {"max_pixels": 6400}}
    small, same = await post(image("large"), **options), await post(image(None, picture), **options)
    assert text_of(small) == text_of(same)
    assert small.json()["usage"]["prompt_tokens"] == same.json()["usage"]["prompt_tokens"]
    usual = await post(image("large"))
    assert usual.json()["usage"]["prompt_tokens"] > small.json()["usage"]["prompt_tokens"]


async def test_no_key_can_name_the_media_of_another(post):
    await post(image("secret", circle("green")))
    for key, salt in (("second", ""), ("third", ""), ("first", "tenant")):
        refused = await post(image("secret"), key, cache_salt=salt)
        assert refusal(refused) == (404, "media_not_cached", "messages[0].content[0].uuid")
        assert "green" not in refused.text
    # Nor does a uuid that is taken by another key hinder anybody.
    assert "blue" in text_of(await post(image("secret", circle("blue")), "second"))
    assert "green" in text_of(await post(image("secret")))


async def test_the_same_uuid_with_other_content_is_refused(post):
    await post(image("one-content", circle("red")))
    refused = await post(image("one-content", circle("blue")))
    assert refusal(refused) == (409, "media_uuid_conflict", "messages[0].content[0].image_url.url")
    assert "red" in text_of(await post(image("one-content")))


async def test_what_could_not_be_shown_is_not_kept(post):
    bad = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}, "uuid": "bad"}
    assert (await post(bad)).status_code == 400
    assert (await post(image("bad"))).status_code == 404


@pytest.mark.parametrize("uuid", ["", "x" * 257, 7, ["a"]])
async def test_a_uuid_is_a_short_string(post, uuid):
    assert refusal(await post(image(uuid, square("red")))) == (
        400,
        "invalid_request",
        "messages[0].content[0].uuid",
    )


async def test_videos_have_uuids_too(post):
    def video(**fields) -> dict:
        return {"type": "video_url", "uuid": "clip", **fields}

    first = await post(video(video_url={"url": data(RED)}))
    again = await post(video(video_url=None))
    assert text_of(again) == text_of(first)
    (seen,), (known,) = (response.json()["usage"]["media"] for response in (first, again))
    assert seen["frames"] == known["frames"] > 1
    fewer = await post(video(num_frames=4))
    assert fewer.json()["usage"]["media"][0]["frames"] == 4
    assert (await post({"type": "image_url", "uuid": "clip"})).status_code == 404
