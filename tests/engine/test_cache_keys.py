"""Law 10: a cache key holds everything that its value depends on. See :mod:`engine.media.keys` for the table.

Each test changes one part that a cached value depends on, and the key must change.
"""

import asyncio
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from engine.checkpoint.folder import Checkpoint
from engine.errors import InvalidRequest
from engine.families.base import PromptAwareProcessor
from engine.families.registry import resolve
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.content_form import ContentForms
from engine.inputs.embeds import given_embeddings
from engine.inputs.placeholders import Placeholders
from engine.media import keys
from engine.media.crew import Crew
from engine.media.keys import content_hash
from engine.media.video.video import Pace, Video
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia
from engine.sampling_params import StructuredSpec
from engine.scheduling.prefix_cache import BlockHasher
from tests.engine.families.cases import case_named
from tests.engine.families.made import Made
from tests.engine.inputs.test_content_form import FORMAT, TOKENIZER
from tests.engine.tiny import picture


def test_content_hash_is_the_same_by_one_thread_and_by_several(monkeypatch):
    monkeypatch.setattr(keys, "_PART", 1000)
    pixels = np.random.default_rng(0).integers(0, 256, (77, 41, 3), dtype=np.uint8)
    base = {"family": "f", "options": {}, "kind": "image", "size": (3, 4)}
    alone, crew, taken = content_hash(pixels, **base), Crew(3), []
    share = crew.share
    crew.share = lambda work, most: taken.append(most) or share(work, most)
    with crew.member():
        assert content_hash(pixels, **base) == alone
        # Each part counts, the last one too, and so does the place of a part.
        for index in (0, 5000, pixels.size - 1):
            changed = pixels.copy()
            changed.reshape(-1)[index] ^= 1
            assert content_hash(changed, **base) != alone
        swapped = np.concatenate([pixels.reshape(-1)[1000:2000], pixels.reshape(-1)[:1000]])
        swapped = np.concatenate([swapped, pixels.reshape(-1)[2000:]]).reshape(pixels.shape)
        assert content_hash(swapped, **base) != alone
    assert taken == [10] * 5
    empty = [content_hash(np.zeros(shape, np.uint8), **base) for shape in ((0, 3), (3, 0))]
    assert len({*empty, alone}) == 3


def test_content_hash():
    base = {"family": "f", "options": {"a": 1, "b": 2}, "kind": "image", "size": (4, 2)}
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    changed = pixels.copy()
    changed[1, 3, 2] ^= 1
    seen = {
        content_hash(pixels, **base),
        content_hash(changed, **base),
        content_hash(pixels.reshape(4, 2, 3), **base),
        content_hash(pixels.view(np.int8), **base),
        content_hash(pixels, **{**base, "family": "g"}),
        content_hash(pixels, **{**base, "options": {"a": 1, "b": 3}}),
        content_hash(pixels, **{**base, "kind": "video"}),
        content_hash(pixels, **{**base, "size": (2, 4)}),
    }
    assert len(seen) == 8
    # Neither the order of options nor the array's layout in memory is content.
    strided = np.zeros((2, 8, 3), np.uint8)[:, ::2]
    strided[...] = pixels
    same = content_hash(strided, **{**base, "options": {"b": 2, "a": 1}})
    assert same == content_hash(pixels, **base)


#: Families with the options of their processors that change an item.
FAMILIES = {
    "LLaVA-1.5": [{}],
    "LLaVA-OneVision": [{}],
    "Phi-3.5-vision": [{"num_crops": 1}, {"num_crops": 4}, {"num_crops": 9}],
    "Qwen2-VL": [{}, {"max_pixels": 2000}, {"min_pixels": 9000}],
    "Qwen2.5-VL": [{"fps": 1.0}, {"fps": 4.0}],
    "Qwen3-VL": [{"fps": 1.0}, {"fps": 4.0}],
    "MiniCPM-V 2.6": [{"max_slice_nums": 1}, {"max_slice_nums": 9}],
    "Idefics3": [{}, {"do_image_splitting": False}, {"size": {"longest_edge": 40}}],
    "SmolVLM": [{}, {"do_image_splitting": False}],
    "InternVL": [{}, {"max_patches": 1}, {"crop_to_patches": True}],
    "GOT-OCR 2": [{}, {"crop_to_patches": True}, {"crop_to_patches": True, "max_patches": 2}],
    "GLM-4.1V": [{}, {"fps": 1.0}],
    "Ovis2": [{}, {"max_patches": 2}],
    "LFM2-VL": [{}, {"max_image_tokens": 16}],
    "Molmo 2": [{}, {"max_crops": 1}],
    "Gemma 3": [{}, {"do_pan_and_scan": True}],
}


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Every processor of a family: with each of its options, and for prompts with one and several images."""

    def made(name):
        checkpoint = Checkpoint.open(str(Made(case_named(name), tmp_path_factory.mktemp("keys")).path))
        family = resolve(checkpoint)
        config = family.parse(checkpoint)
        found = [family.media_processor(checkpoint, config, options) for options in FAMILIES[name]]
        aware = [one for one in found if isinstance(one, PromptAwareProcessor)]
        return [*found, *(one.among(count) for one in aware for count in (1, 2))]

    return made


def described(item):
    """Everything about an item but its hash."""
    return dataclasses.replace(item, hash="")


@pytest.mark.parametrize("name", FAMILIES)
def test_items_of_one_hash_are_one_item(name, processors):
    """Through all options, images, sizes and videos: equal hashes mean equal items and equal pixels."""
    known: dict[str, PreparedMedia] = {}
    images = [picture(w, h, seed) for w, h in ((40, 40), (28, 56), (56, 28), (20, 80)) for seed in (1, 2)]
    frames = [images[:1] * 2, images[:1] * 4, [images[0], images[1]], [images[1], images[0]]]
    clips = [Video.of(shown) for shown in frames]
    clips += [Video.of(frames[1], pace) for pace in (Pace.of_rate(4, 1.0), Pace.of_rate(4, 8.0))]
    clips += [dataclasses.replace(clips[-1], pace=dataclasses.replace(Pace.of_rate(4, 8.0), duration=60.0))]
    for processor in processors(name):
        media = [processor.prepare(image) for image in images]
        for clip in clips:
            try:
                media.append(processor.prepare_video(clip))
            except InvalidRequest:
                break
        for one in media:
            other = known.setdefault(one.item.hash, one)
            assert described(one.item) == described(other.item)
            np.testing.assert_array_equal(one.pixels, other.pixels)
    assert len(known) >= len(images)


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_of_one_hash_are_one_item(name, processors):
    known: dict[str, tuple[MediaItem, torch.Tensor]] = {}
    grids, sizes = [(1, 12, 16), (1, 16, 12), (3, 8, 8)], [(40, 40), (28, 56), (56, 28), (20, 80)]
    for processor, copies in itertools.product(processors(name), (1, 2)):
        field = processor.embedding_field
        aware = isinstance(processor, PromptAwareProcessor)
        describer = processor.among(copies) if aware else processor
        for given in [()] if field is None else grids if field.name == "image_grid_thw" else sizes:
            count = describer.embedding_item(given, "").num_tokens
            rows = torch.arange(count * 4, dtype=torch.float32).reshape(count, 4)
            changed = rows.clone()
            changed[-1, -1] += 1
            for tensor in (rows, changed, rows.double(), rows.bfloat16()):
                value = {"image_embeds": [tensor] * copies}
                if field is not None:
                    value[field.name] = [given] * copies
                found, _ = given_embeddings(value, processor)[0]
                other, other_rows = known.setdefault(found.hash, (found, tensor))
                assert described(found) == described(other)
                assert tensor.dtype == other_rows.dtype and torch.equal(tensor, other_rows)
    assert len(known) >= 4


def test_embeddings_under_another_grid_have_another_hash(processors):
    processor = processors("Qwen2-VL")[0]
    rows = torch.zeros(48, 4)
    grids = [(1, 12, 16), (1, 16, 12), (3, 8, 8), (1, 4, 48)]
    found = [
        given_embeddings({"image_embeds": rows, "image_grid_thw": [grid]}, processor)[0][0] for grid in grids
    ]
    assert len({item.hash for item in found}) == 4
    assert [item.grid for item in found] == grids


def item(key="a", rows=3):
    return MediaItem("image", key, rows, (1, 2, 2), (8, 8), (PlaceholderRun(7, rows, True),))


def test_block_hashes():
    ids = list(range(20))
    spans = [MediaSpan(item(), 1, 3)]

    def last(ids=ids, spans=spans, salt="s", rope=0, model="m", secret=b"k" * 32, both_ways=()):
        hashes: list[bytes] = []
        BlockHasher(4, model, secret).extend(hashes, ids, len(ids), spans, salt, rope, both_ways)
        assert len(hashes) == 5
        return hashes[-1]

    changed = [
        last(),
        last(ids=[99, *ids[1:]]),
        last(ids=[*ids[:-1], 99]),
        last(spans=[]),
        last(spans=[MediaSpan(item("b"), 1, 3)]),
        last(spans=[MediaSpan(item(), 0, 3)]),
        last(spans=[MediaSpan(item(), 1, 3), MediaSpan(item("b"), 18, 1)]),
        last(salt="t"),
        last(salt=""),
        last(rope=1),
        last(model="n"),
        last(secret=b"l" * 32),
        last(both_ways=[(1, 4)]),
        last(both_ways=[(1, 5)]),
    ]
    assert len(set(changed)) == len(changed)
    assert last() == changed[0]


def test_block_hashes_tell_tokens_of_an_answer_from_those_of_a_prompt():
    ids = [*range(10), 7, 3, 7, 7]

    def hashes(num_prompt, told_apart=(7,), ids=ids):
        found: list[bytes] = []
        for end in (9, 14):  # As blocks become full.
            hasher = BlockHasher(2, "m", told_apart=told_apart)
            hasher.extend(found, ids[:end], end, [], "", num_prompt=num_prompt)
        return found

    whole = hashes(14)
    assert hashes(14, told_apart=()) == hashes(3, told_apart=()) == hashes(None) == whole
    assert hashes(13)[:6] == whole[:6] and hashes(13)[6] != whole[6]
    assert hashes(10)[:5] == whole[:5] and hashes(10)[5] != whole[5]
    assert hashes(8)[:5] == whole[:5] and hashes(7)[3] != whole[3] and hashes(7)[:3] == whole[:3]


def test_the_hash_of_a_block_that_attends_to_later_tokens():
    ids, spans = list(range(20)), [MediaSpan(item(), 9, 3)]

    def first(ids=ids, spans=spans, both_ways=((2, 12),)):
        hashes: list[bytes] = []
        BlockHasher(4, "m").extend(hashes, ids, 4, spans, "", 0, both_ways)
        return hashes[0]

    changed = [
        first(),
        first(ids=[*ids[:8], 99, *ids[9:]]),
        first(spans=[MediaSpan(item("b"), 9, 3)]),
        first(both_ways=[(2, 13)]),
        first(both_ways=[]),
    ]
    assert len(set(changed)) == len(changed)
    # What lies beyond the range doesn't count.
    assert first(ids=[*ids[:12], 99]) == first()


def test_encoder_rows(tmp_path):
    """Rows of one tenant's item serve neither another tenant nor another item."""
    llm = Made(case_named("Qwen2-VL"), tmp_path).llm()
    prepare = llm._frontend._processor.prepare
    media = [prepare(picture(40, 40, 1)), prepare(picture(40, 40, 2))]

    async def encode():
        for one, salt in itertools.product(media, ("", "a", "b")):
            await llm._encoder.encode_async(one, salt=salt)

    asyncio.run(encode())
    counters = llm._encoder.metrics()
    assert (counters["items"], counters["cache_hits"]) == (6, 0)
    asyncio.run(encode())
    assert llm._encoder.metrics()["cache_hits"] == 6


def test_grammars():
    given = [("regex", "a", False), ("regex", "b", False), ("grammar", "a", False), ("grammar", "a", True)]
    specs = [StructuredSpec(kind=kind, text=text, holds_json=holds) for kind, text, holds in given]
    assert len(set(specs)) == 4 and len({hash(spec) for spec in specs}) == 4
    # A grammar depends on nothing else that a request brings.
    assert {field.name for field in dataclasses.fields(StructuredSpec)} == {"kind", "text", "holds_json"}


def test_forms_of_content():
    """A template may take another form from each role, and there may be another template for tools."""
    string = "{% for m in messages %}{{ m.content + '' }}{% endfor %}"
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    mixed = "{% for m in messages %}{% if m.role == 'user' %}" + string[string.index("{{") : -12]
    mixed += "{% else %}" + parts[len("{% for m in messages %}") : -12] + "{% endif %}{% endfor %}"
    template = ChatTemplate({"default": mixed, "tool_use": parts})
    forms = ContentForms(template, Placeholders(FORMAT, TOKENIZER))
    keys = itertools.product(("user", "assistant"), (False, True))
    texts = [forms.of(role, with_tools=tools).texts - {"absent"} for role, tools in keys]
    assert texts == [{"string"}, {"part", "parts"}, {"part", "parts"}, {"part", "parts"}]
