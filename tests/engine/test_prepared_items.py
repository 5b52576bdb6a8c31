"""Items that were prepared before: what they depend on, and what they cost again."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import MediaError
from engine.families.internvl.processor import InternVLProcessor
from engine.lru import LruCache
from engine.media.documents.pages import PageOptions
from engine.media.keys import kept_files
from engine.media.ledger import Ledger, MediaLimits
from engine.media.source import MediaSource
from engine.media.video.video import VideoOptions
from engine.preparation import MediaPreparation
from engine.prepared_items import PreparedItems
from engine.prompt import MediaItem, PreparedMedia
from tests.engine.tiny import picture

PROCESSOR = InternVLProcessor(side=16, rows=4, image_token_id=7)
IMAGE = MediaSource(0, "image")
BUDGET = 1 << 20


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


FILE, OTHER = encoded(picture(60, 44)), encoded(picture(60, 44, 8))
FRAMES = replace(IMAGE, kind="video", frames=(IMAGE, IMAGE))
#: A call, and one that differs from it in one part of what the item depends on.
PAIRS = {
    "file": ((PROCESSOR, IMAGE, [FILE], ""), (PROCESSOR, IMAGE, [OTHER], "")),
    "processor": (
        (PROCESSOR, IMAGE, [FILE], ""),
        (replace(PROCESSOR, resample=2), IMAGE, [FILE], ""),
    ),
    "detail": ((PROCESSOR, IMAGE, [FILE], ""), (PROCESSOR, replace(IMAGE, detail="low"), [FILE], "")),
    "options of the request": (
        (PROCESSOR, IMAGE, [FILE], ""),
        (PROCESSOR, replace(IMAGE, options={"max_patches": 2}), [FILE], ""),
    ),
    "salt": ((PROCESSOR, IMAGE, [FILE], "one"), (PROCESSOR, IMAGE, [FILE], "two")),
    "kind": ((PROCESSOR, FRAMES, [FILE], ""), (PROCESSOR, IMAGE, [FILE], "")),
    "number of frames": ((PROCESSOR, FRAMES, [FILE, FILE], ""), (PROCESSOR, FRAMES, [FILE], "")),
    "where a file ends": (
        (PROCESSOR, FRAMES, [FILE, OTHER], ""),
        (PROCESSOR, FRAMES, [OTHER, FILE], ""),
    ),
    "frames asked for": (
        (PROCESSOR, FRAMES, [FILE, FILE], ""),
        (PROCESSOR, replace(FRAMES, video=VideoOptions(fps=2.0)), [FILE, FILE], ""),
    ),
}


@pytest.fixture
def preparation():
    made = MediaPreparation(PROCESSOR)
    yield made
    made.close()


def same(one: PreparedMedia, other: PreparedMedia) -> bool:
    return one.item == other.item and np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_an_item_is_known_by_all_that_it_depends_on(preparation, first, second):
    items = PreparedItems(preparation, BUDGET)
    for processor, source, files, salt in (first, second):
        expected = preparation.prepare(processor, source, files)
        made = items.prepare(processor, source, files, salt=salt)
        # Another field of the request, with equal bytes.
        again = items.prepare(processor, replace(source, index=3, where="later"), list(files), salt=salt)
        assert same(made, expected) and again is made
    assert items.metrics()["cache_hits"] == items.metrics()["cache_misses"] == 2


def test_pages_are_known_by_number_and_file(preparation):
    frames = [picture(30, 20, number) for number in range(3)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    file = kept_files([data])
    pages = preparation.open(replace(IMAGE, pages=PageOptions()), data).sources
    items = PreparedItems(preparation, BUDGET)
    first = items.prepare_pages(PROCESSOR, pages[1:2], file)
    every = items.prepare_pages(PROCESSOR, pages, file)
    expected = preparation.prepare_pages(PROCESSOR, pages, data)
    assert every[1] is first[0] and len(every) == 3 and all(map(same, every, expected))
    twice = items.prepare_pages(PROCESSOR, [pages[1]] * 2, file)
    assert len(twice) == 2 and all(each is first[0] for each in twice)
    other = kept_files([encoded(frames[2], "TIFF", save_all=True, append_images=frames[:2])])
    assert not same(items.prepare_pages(PROCESSOR, pages[:1], other)[0], every[0])
    assert not any(each is every[0] for each in items.prepare_pages(PROCESSOR, pages[:1], file, "salt"))


def test_a_known_video_file_is_charged_as_its_decoding_is():
    class Decoded:
        def prepare(self, processor, source, files, account):
            item = MediaItem.of_rows("video", "key", 7, 4, grid=(3, 0, 0), size=(50, 40))
            account.charge("frames", 3, source.where)
            account.charge("pixels", 3 * 50 * 40, source.where)
            return PreparedMedia(item, np.zeros(8, np.uint8), frames=3)

    items, source = PreparedItems(Decoded(), BUDGET), MediaSource(0, "video", "video")
    ledger, left = Ledger(MediaLimits()), []
    for _ in range(2):
        with ledger.open("caller") as account:
            items.prepare(PROCESSOR, source, [b"file"], account)
            left.append(ledger.held("caller"))
    assert left[0] == left[1] and items.metrics()["cache_hits"] == 1


def test_errors_are_not_kept(preparation):
    items = PreparedItems(preparation, BUDGET)
    for where in ("first", "second"):
        with pytest.raises(MediaError) as raised:
            items.prepare(PROCESSOR, replace(IMAGE, where=where), [b"no image"])
        assert raised.value.param == where
    assert items.metrics()["cached_items"] == 0


def test_the_budget_counts_pixels_and_can_be_lowered(preparation):
    items = PreparedItems(preparation, BUDGET)
    made = [items.prepare(PROCESSOR, IMAGE, [file]) for file in (FILE, OTHER)]
    assert items.metrics()["cached_bytes"] == sum(media.pixels.nbytes for media in made)
    items.limit(made[1].pixels.nbytes)
    assert items.metrics()["cached_items"] == 1 and items.prepare(PROCESSOR, IMAGE, [OTHER]) is made[1]
    items.limit(0)
    assert items.prepare(PROCESSOR, IMAGE, [OTHER]) is not made[1]
    assert items.metrics()["cached_bytes"] == 0


def test_the_least_recently_used_value_goes_first():
    cache: LruCache[str] = LruCache(10)
    for key in "abc":
        cache.put(key, key.upper(), 3)
    assert cache.get("a") == "A"
    cache.put("d", "D", 4)
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"] and cache.bytes == 10
    cache.put("large", "", 11)
    assert cache.get("large") is None and len(cache) == 3
