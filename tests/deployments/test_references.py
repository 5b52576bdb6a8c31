"""Media are kept for later requests of the same caller, for a while."""

from dataclasses import dataclass

import pytest

from deployments.references import (
    Owner,
    ReferenceConfig,
    ReferenceConflict,
    References,
    UnknownReference,
)
from engine.errors import InvalidRequest
from engine.media.keys import kept_files
from engine.media.source import MediaSource
from engine.media.video.video import VideoOptions

ALICE, BOB = Owner("alice", ""), Owner("bob", "")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def brought(uuid: str, kind: str = "image", **fields) -> MediaSource:
    return MediaSource(
        0, "messages[0].content[0].image_url.url", kind, uuid=uuid, **{"url": "data:,"} | fields
    )


def named(uuid: str, kind: str = "image", **fields) -> MediaSource:
    return MediaSource(0, "messages[0].content[0].uuid", kind, uuid=uuid, **fields)


async def keep(references: References, owner: Owner, uuid: str, data: bytes = b"data") -> None:
    await references.keep(owner, brought(uuid), kept_files([data]))


async def is_kept(references: References, owner: Owner, uuid: str) -> bool:
    try:
        _, files = await references.resolve(owner, [named(uuid)])
    except UnknownReference as error:
        assert error.status == 404 and error.param == "messages[0].content[0].uuid"
        return False
    return files[0].size > 0


async def test_media_are_kept_for_their_owner_alone():
    references = References(ReferenceConfig())
    await keep(references, ALICE, "a")
    assert await is_kept(references, ALICE, "a")
    for other in (
        BOB,
        Owner("alice", "salt"),
        Owner("alice", "", "another model"),
        Owner("", "alice"),
        Owner("", ""),
    ):
        assert not await is_kept(references, other, "a")
    # Two owners may use one uuid for different content.
    await keep(references, BOB, "a", b"other")
    (_, files), (_, others) = [await references.resolve(owner, [named("a")]) for owner in (ALICE, BOB)]
    assert files[0].files == [b"data"] and others[0].files == [b"other"]


async def test_a_uuid_stands_for_one_content_while_it_is_kept():
    clock = Clock()
    references = References(ReferenceConfig(seconds=60), clock)
    await keep(references, ALICE, "a", b"first")
    await keep(references, ALICE, "a", b"first")
    with pytest.raises(ReferenceConflict) as error:
        await keep(references, ALICE, "a", b"second")
    assert error.value.status == 409 and error.value.param == "messages[0].content[0].image_url.url"
    # The same bytes cut into files otherwise are other content.
    with pytest.raises(ReferenceConflict):
        await references.keep(ALICE, brought("a"), kept_files([b"fir", b"st"]))
    clock.now = 61
    await keep(references, ALICE, "a", b"second")
    _, files = await references.resolve(ALICE, [named("a")])
    assert files[0].files == [b"second"]


async def test_media_that_nobody_uses_are_dropped():
    clock = Clock()
    references = References(ReferenceConfig(seconds=60), clock)
    await keep(references, ALICE, "a")
    clock.now = 50
    assert await is_kept(references, ALICE, "a")
    clock.now = 100
    assert await is_kept(references, ALICE, "a")
    clock.now = 161
    assert not await is_kept(references, ALICE, "a") and references.held_bytes == 0


async def test_the_key_that_holds_most_makes_room():
    references = References(ReferenceConfig(max_bytes=100))
    await keep(references, BOB, "small", b"." * 10)
    for number in range(20):
        await keep(references, ALICE, f"large-{number}", b"." * 30)
    assert await is_kept(references, BOB, "small") and references.held_bytes == 100
    assert [await is_kept(references, ALICE, f"large-{number}") for number in (16, 17, 18, 19)] == [
        False,
        *[True] * 3,
    ]
    # The least recently used one goes.
    assert await is_kept(references, ALICE, "large-17")
    await keep(references, ALICE, "large-20", b"." * 30)
    assert await is_kept(references, ALICE, "large-17") and not await is_kept(references, ALICE, "large-18")
    # Too large for any room: nothing else is dropped for it.
    await keep(references, BOB, "huge", b"." * 101)
    assert not await is_kept(references, BOB, "huge") and references.held_bytes == 100


async def test_there_are_so_many_items_at_most():
    references = References(ReferenceConfig(max_items=3))
    for number in range(5):
        await keep(references, ALICE, f"{number}")
    await keep(references, BOB, "0")
    assert [await is_kept(references, ALICE, f"{number}") for number in range(5)] == [
        *[False] * 3,
        True,
        True,
    ]
    assert await is_kept(references, BOB, "0")


async def test_a_server_may_keep_nothing():
    references = References(ReferenceConfig(max_bytes=0))
    await keep(references, ALICE, "a")
    with pytest.raises(UnknownReference, match="this server keeps no media"):
        await references.resolve(ALICE, [named("a")])


async def test_an_image_is_no_video():
    references = References(ReferenceConfig())
    await keep(references, ALICE, "a")
    with pytest.raises(UnknownReference, match="no video of the uuid 'a'"):
        await references.resolve(ALICE, [named("a", "video")])


async def test_a_list_of_frames_keeps_its_form_and_its_times():
    references = References(ReferenceConfig())
    frames = tuple(MediaSource(0, f"frame {index}", url="data:,") for index in range(3))
    times = VideoOptions(times=(0.0, 1.0, 2.0))
    await references.keep(
        ALICE, brought("v", "video", url=None, frames=frames, video=times), kept_files([b"."] * 3)
    )
    (found,), files = await references.resolve(ALICE, [named("v", "video")])
    assert len(found.frames) == 3 and not found.is_video_file and found.video == times
    assert all(frame.url is None for frame in found.frames) and len(files[0].files) == 3
    (found,), _ = await references.resolve(ALICE, [named("v", "video", video=VideoOptions(fps=2.0))])
    assert found.video == VideoOptions(fps=2.0)
    for wrong in (VideoOptions(times=(0.0, 1.0)), VideoOptions(num_frames=2)):
        with pytest.raises(InvalidRequest, match="3 frames"):
            await references.resolve(ALICE, [named("v", "video", video=wrong)])


async def test_lost_files_are_forgotten():
    references = References(ReferenceConfig())
    await keep(references, ALICE, "a")
    await keep(references, ALICE, "b")
    with pytest.raises(UnknownReference):
        await references.lost(ALICE, [named("a")])
    assert not await is_kept(references, ALICE, "a") and await is_kept(references, ALICE, "b")
