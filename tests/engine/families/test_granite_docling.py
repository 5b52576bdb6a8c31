"""Granite-Docling: tiles by size, rows by both connectors, and what is refused by name."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers

from engine.errors import ConfigError, InvalidRequest
from engine.families.granite_docling.encoder import square_positions
from tests.engine.families.granite_docling import (
    HAS_GRANITE_DOCLING,
    SIDE,
    SPREAD,
    GraniteDoclingReference,
    make_granite_docling_tiles,
)
from tests.engine.families.opened import check_refused, copy_json, encoder, media_processor
from tests.engine.tiny import picture

SIZES = [(30, 33), (90, 30), (70, 60), (1, 1), (7, 300), (300, 7), (64, 64)]

pytestmark = pytest.mark.skipif(
    not HAS_GRANITE_DOCLING, reason="this release of Transformers has no such family"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_granite_docling_tiles(tmp_path_factory.mktemp("granite_docling"))


@pytest.mark.parametrize("fine", [False, True])
def test_tiles_and_rows_are_those_of_transformers(path, fine):
    ours, vision = media_processor(path, fine_route=fine), encoder(path)
    reference = GraniteDoclingReference(path, fine_route=fine)
    for size in SIZES:
        image = picture(*size)
        made, prepared = reference.images([[image]], return_tensors="pt"), ours.prepare(image)
        _, rows, columns = prepared.item.grid
        assert ([[rows]], [[columns]]) == (made["rows"], made["cols"]), size
        tiles = vision.pixels.last(torch.from_numpy(prepared.pixels).flatten(1, 2))
        tiles = tiles.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2)
        assert torch.equal(tiles, torch.as_tensor(made["pixel_values"])[0]), size
        with torch.inference_mode():
            found = reference.model.model.get_image_features(
                made["pixel_values"], made["pixel_attention_mask"], made.get("tile_fine_mask")
            )
        expected = torch.cat([found.pooler_output[0], *(each[0] for each in found.deepstack_features)], -1)
        assert len(expected) == prepared.item.num_tokens == ours.check(size)
        torch.testing.assert_close(vision.encode([prepared])[0], expected, rtol=1e-4, atol=1e-5)


def test_both_connectors_in_one_batch(path):
    vision, coarse = encoder(path), media_processor(path)
    fine = media_processor(path, fine_route=True)
    items = [make.prepare(picture(*size)) for size in SIZES[:3] for make in (coarse, fine)]
    for alone, together in zip(items, vision.encode(items), strict=True):
        torch.testing.assert_close(vision.encode([alone])[0], together, rtol=1e-4, atol=1e-5)
    coarse_item, fine_item = items[0].item, items[1].item
    assert fine_item.num_tokens == 4 * coarse_item.num_tokens and fine_item.hash != coarse_item.hash


@pytest.mark.parametrize(
    "stated",
    [
        {"max_patches": 32},
        {"max_patches": 256, "min_patches": 3},
        {"max_patches": 12, "dense_max_patches": 40, "dense_min_aspect": 1.3},
        {"max_patches": 6, "dense_max_patches": 24, "dense_max_scale": 0.7},
        {"max_patches": 6, "dense_max_patches": 1, **{k: v for k, v in SPREAD.items() if "aspect" in k}},
    ],
    ids=str,
)
def test_tilings_are_those_of_transformers(path, tmp_path, stated):
    copy_json(path, tmp_path)
    plain = {"size": {"height": SIDE, "width": SIDE}, **stated}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(plain))
    ours, draw = media_processor(tmp_path), random.Random(str(stated))
    theirs = transformers.GraniteDoclingImageProcessorPil(**plain)
    seen = set()
    for _ in range(60):
        width, height = (round(2 ** draw.uniform(0, 10)) for _ in range(2))
        _, *tiling = ours.grid((width, height))
        assert tuple(tiling) == theirs.get_tile_grid(height, width), (width, height)
        seen.add(tuple(tiling))
    assert len(seen) > 4


def test_positions_are_those_of_transformers():
    module = transformers.models.granite_docling.modeling_granite_docling
    for side, width in ((2, 8), (5, 64)):
        expected = module.GraniteDoclingPositionEmbedding.build(width, side)
        torch.testing.assert_close(square_positions(side, width), expected, rtol=0, atol=1e-6)


def test_requests_may_ask_for_less(path):
    ours = media_processor(path, fine_route=True)
    size = (70, 60)
    assert ours.with_options({"fine_route": False}).check(size) * 4 == ours.check(size)
    assert ours.with_options({"max_patches": 1}).grid(size) == (1, 1, 1) == ours.low_detail().grid(size)
    # A spread has more tiles than others, but not for who asks for fewer.
    assert ours.grid((300, 50))[0] > 5 >= ours.with_options({"max_patches": 3}).grid((300, 50))[0]
    for options in ({"fine_route": True}, {"max_patches": 5}):
        with pytest.raises(InvalidRequest, match="mm_processor_kwargs"):
            media_processor(path).with_options(options)


@pytest.mark.parametrize(
    ("vision", "param"),
    [
        ({"scale_factor": 3}, "scale_factor"),
        ({"scale_factor": 1}, "scale_factor"),
        ({"out_hidden_size": 32}, "out_hidden_size"),
        ({"deepstack_visual_indexes": [0, 3]}, "deepstack_visual_indexes"),
        ({"deepstack_visual_indexes": [1, 1]}, "deepstack_visual_indexes"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(path, tmp_path, vision, param):
    copy_json(path, tmp_path)
    stated = json.loads((path / "config.json").read_text())["vision_config"]
    check_refused(tmp_path, "config.json", {"vision_config": {**stated, **vision}}, param)


def test_a_checkpoint_without_fine_connector_has_no_fine_rows(path, tmp_path):
    copy_json(path, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["use_fine_route"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="fine_route"):
        media_processor(tmp_path, fine_route=True)
