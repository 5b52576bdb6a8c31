"""The cost of media by request: ``detail``, ``mm_processor_kwargs`` and ``media_io_kwargs``."""

import uuid

import openai
import pytest

from tests.deployments.pictures import circle, data_url
from tests.deployments.routers.test_videos import RED, data, shown

pytestmark = pytest.mark.usefixtures("idle_afterwards")

LARGE = data_url(circle("red", (640, 480)))


async def tokens(client, part: dict, **extra) -> int:
    made = await client.chat.completions.create(
        model="pocket", messages=shown(part), temperature=0, max_tokens=4, extra_body=extra
    )
    return made.usage.prompt_tokens


def image(**detail) -> dict:
    return {"type": "image_url", "image_url": {"url": LARGE, **detail}}


async def test_fewer_pixels_cost_fewer_tokens(client, http):
    usual = await tokens(client, image())
    few = {"max_pixels": 6400}
    assert await tokens(client, image(), mm_processor_kwargs=few) < usual
    assert await tokens(client, image(), mm_processor_kwargs=None, media_io_kwargs={}) == usual
    assert await tokens(client, image(detail="high")) == usual
    counted = [
        (await http.post("/tokenize", json={"model": "pocket", "messages": shown(image()), **extra})).json()
        for extra in ({}, {"mm_processor_kwargs": few})
    ]
    assert [entry["count"] for entry in counted] == [
        usual,
        await tokens(client, image(), mm_processor_kwargs=few),
    ]


async def test_frames_of_all_videos_of_a_request(client):
    part = {"type": "video_url", "video_url": {"url": data(RED)}}
    own = {"type": "video_url", "video_url": {"url": data(RED), "num_frames": 12}}
    usual = await tokens(client, part)
    four = await tokens(client, part, media_io_kwargs={"video": {"num_frames": 4}})
    assert four == await tokens(client, part, mm_processor_kwargs={"fps": 1}) < usual
    # A part's own wish comes first.
    assert await tokens(client, own, media_io_kwargs={"video": {"num_frames": 4}}) > usual


SMALL = {"type": "image_url", "image_url": {"url": data_url(circle("red", (90, 131)))}}
VIDEO = {"type": "video_url", "video_url": {"url": data(RED)}}


@pytest.mark.parametrize(
    ("usual", "asked", "extra"),
    [
        (image(), image(detail="low"), {}),
        (image(), image(), {"mm_processor_kwargs": {"max_pixels": 6400}}),
        (SMALL, SMALL, {"mm_processor_kwargs": {"min_pixels": 40000}}),
        (VIDEO, VIDEO, {"mm_processor_kwargs": {"max_pixels": 6400}}),
        (VIDEO, VIDEO, {"mm_processor_kwargs": {"fps": 1}}),
        (VIDEO, VIDEO, {"media_io_kwargs": {"video": {"num_frames": 4}}}),
        (VIDEO, {**VIDEO, "fps": 1}, {}),
    ],
)
async def test_each_option_is_part_of_every_cache_key(client, usual, asked, extra):
    """Rows and blocks of the same media prepared otherwise are never taken, from whichever cache."""

    async def answer(part: dict, salt: str, **extra) -> tuple:
        made = await client.chat.completions.create(
            model="pocket",
            messages=shown(part),
            temperature=0,
            max_tokens=4,
            logprobs=True,
            extra_body={"include_timings": True, "cache_salt": salt, **extra},
        )
        logprobs = [token.logprob for token in made.choices[0].logprobs.content]
        (seen,) = made.usage.media
        return made.choices[0].message.content, made.usage.prompt_tokens, logprobs, seen["cached"]

    salt = uuid.uuid4().hex
    alone = await answer(asked, f"alone {salt}", **extra)
    await answer(usual, salt)
    beside = await answer(asked, salt, **extra)
    again = await answer(asked, salt, **extra)
    assert beside[:2] == alone[:2] == again[:2]
    assert beside[2] == pytest.approx(alone[2], abs=1e-3) == again[2]
    changes = (await answer(usual, f"usual {salt}"))[1] != alone[1]
    assert changes or "detail" in str(asked), "the option changes nothing, so it tests nothing"
    assert (beside[3], again[3]) == (not changes, True)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"mm_processor_kwargs": {"num_crops": 4}}, "mm_processor_kwargs.num_crops"),
        ({"mm_processor_kwargs": {"max_pixels": 1 << 40}}, "mm_processor_kwargs.max_pixels"),
        ({"mm_processor_kwargs": {"fps": 0}}, "mm_processor_kwargs.fps"),
        ({"media_io_kwargs": {"video": {"backend": "x"}}}, "media_io_kwargs.video.backend"),
        ({"media_io_kwargs": {"audio": {}}}, "media_io_kwargs.audio"),
    ],
)
async def test_options_that_are_not_offered_are_refused_by_name(client, extra, param):
    with pytest.raises(openai.BadRequestError, match=param.split(".")[0]) as error:
        await tokens(client, image(), **extra)
    assert error.value.param == param
