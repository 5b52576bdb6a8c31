"""Videos over HTTP: files and lists of frames, and the frames that a client asks for."""

import base64

import openai
import pytest

from tests.deployments.pictures import circle, data_url
from tests.engine.media.clips import clip, filmed

pytestmark = pytest.mark.usefixtures("idle_afterwards")

RED = filmed(circle("red"), 12, 4)


def data(video: bytes, container: str = "mp4") -> str:
    return f"data:video/{container};base64,{base64.b64encode(video).decode()}"


def shown(part: dict, question: str = "What color is the circle?") -> list[dict]:
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


async def asked(client, part: dict, **options):
    return await client.chat.completions.create(
        model="pocket", messages=shown(part), temperature=0, max_tokens=20, **options
    )


def parts(url: str) -> list[dict]:
    """The ways in which clients send a video file."""
    return [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video_url", "video_url": url},
        {"type": "input_video", "video_url": url},
        {"type": "video", "video": url},
        {"type": "file", "file": {"file_data": url, "filename": "clip.mp4"}},
        {"type": "file", "file": {"file_data": url.partition(",")[2], "filename": "clip.mp4"}},
    ]


async def test_every_way_of_sending_a_file_is_the_same_video(client, running):
    (running.pictures / "clip.mp4").write_bytes(RED)
    ways = [*parts(data(RED)), *parts(f"{running.site}/clip.mp4")[:4]]
    answers = [await asked(client, part) for part in ways]
    assert "red" in answers[0].choices[0].message.content
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1


async def test_a_list_of_frames_is_the_file_with_the_same_frames(client):
    """12 frames at 4 a second are 6 frames at 2 a second."""
    frames = [data_url(circle("red"))] * 6
    listed = await asked(client, {"type": "video", "video": frames, "fps": 2})
    filed = await asked(client, {"type": "video_url", "video_url": {"url": data(RED)}})
    assert listed.usage.prompt_tokens == filed.usage.prompt_tokens
    jpegs = ",".join(data_url(circle("red"), "JPEG").partition(",")[2] for _ in range(6))
    joined = await asked(client, {"type": "video_url", "video_url": f"data:video/jpeg;base64,{jpegs}"})
    assert joined.usage.prompt_tokens == filed.usage.prompt_tokens


async def test_fewer_frames_cost_fewer_tokens(client):
    video = data(filmed(circle("red"), 40, 10))
    costs = []
    for options in ({}, {"fps": 1}, {"num_frames": 4}, {"num_frames": 12}):
        part = {"type": "video_url", "video_url": {"url": video, **options}}
        costs.append((await asked(client, part)).usage.prompt_tokens)
    beside = await asked(client, {"type": "video_url", "video_url": {"url": video}, "num_frames": 4})
    usual, slow, four, twelve = costs
    assert slow == four == beside.usage.prompt_tokens < usual < twelve


@pytest.mark.parametrize(
    ("part", "param", "says"),
    [
        ({"video_url": {"url": data(b"nothing")}}, "video_url.url", "in no format"),
        ({"video_url": {"url": data(RED), "fps": 0}}, "video_url.fps", "above 0"),
        ({"video_url": {"url": data(RED), "fps": 1, "num_frames": 2}}, "video_url.num_frames", "exclude"),
        ({"video_url": {"url": data(RED), "num_frames": 900}}, "video_url.url", "12 frames"),
        ({"video_url": {"url": data(RED), "timestamps": [0]}}, "video_url.timestamps", "list of frames"),
        ({"video_url": {}}, "video_url.url", "URL of a video"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "file.file_id", "keeps no files"),
        ({"type": "file", "file": {"file_data": "data:application/zip;base64,AA"}}, "file.file_data", "only"),
    ],
)
async def test_faults_name_the_field_and_say_what_to_change(client, part, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as error:
        await asked(client, {"type": "video_url"} | part)
    assert error.value.param == f"messages[0].content[0].{param}"


async def test_a_long_video_is_refused_before_it_is_decoded(client):
    """5 minutes at two frames a second don't fit into pocket's context."""
    long = clip(300, 1, size=(320, 240), key_every=300)
    with pytest.raises(openai.BadRequestError) as error:
        await asked(client, {"type": "video_url", "video_url": {"url": data(long)}})
    assert error.value.code == "context_length_exceeded"
