"""Gemma 4 unified: squares and rows bit for bit, the fields of its files, and what is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma4UnifiedTextConfig

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.parsing.decoder import parse_decoder
from engine.fit import check_fit
from engine.media.video.video import Video
from tests.engine.families.gemma4 import PATCH, ROWS, SIDE
from tests.engine.families.gemma4_unified import Gemma4UnifiedReference, make_gemma4_unified
from tests.engine.families.opened import copy_json, encoder, media_processor, parse
from tests.engine.families.test_gemma4 import SIZES
from tests.engine.tiny import picture


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_gemma4_unified(tmp_path_factory.mktemp("gemma4_unified"))


def test_squares_and_rows_are_those_of_transformers(path):
    ours, theirs, vision = media_processor(path), Gemma4UnifiedReference(path), encoder(path)
    for size in SIZES:
        made, prepared = theirs.prepared(theirs.images, picture(*size)), ours.prepare(picture(*size))
        squares = vision.pixels.last(vision._squares(torch.from_numpy(prepared.pixels)))
        assert torch.equal(squares, made["pixel_values"][0].float()), size
        assert torch.equal(vision._places(prepared.item).T, made["image_position_ids"][0]), size
        with torch.inference_mode():
            rows = theirs.model.get_image_features(made["pixel_values"], made["image_position_ids"])
        assert torch.equal(vision.encode([prepared])[0], rows.pooler_output[0]), size


def test_items_in_a_batch_are_items_alone(path):
    ours, vision = media_processor(path), encoder(path)
    items = [ours.prepare(picture(*size)) for size in SIZES]
    items.append(ours.prepare_video(Video.of([picture(40, 56, number) for number in range(3)])))
    for alone, together in zip(items, vision.encode(items), strict=True):
        torch.testing.assert_close(vision.encode([alone])[0], together)
        assert vision.cost(alone.item) == len(together)


def test_pixels_that_are_not_those_of_the_grid_are_refused(path):
    prepared = media_processor(path).prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="do not fit grid"):
        encoder(path).encode([type(prepared)(prepared.item, prepared.pixels[1:])])


def test_fields_that_are_left_out_have_the_values_of_transformers():
    ours, theirs = parse_decoder({}, "gemma4_unified_text"), Gemma4UnifiedTextConfig()
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.layer_inputs is None and ours.experts is None
    for layer, kind in enumerate(theirs.layer_types):
        heads = theirs.per_layer_config[layer]
        assert ours.heads_of(layer) == (heads.num_key_value_heads, heads.head_dim)
        assert ours.window(layer) == (theirs.sliding_window if kind == "sliding_attention" else None)


@pytest.mark.parametrize("stated", [{}, {"use_bidirectional_attention": None}], ids=str)
def test_images_attend_both_ways_unless_the_file_says_no(path, tmp_path, stated):
    copy_json(path, tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["text_config"]["use_bidirectional_attention"]
    config["text_config"] |= stated
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parse(tmp_path)[1].decoder.both_ways == (None if stated else "images")


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        (None, "vision_config null"),
        ({"mm_embed_dim": 40, "output_proj_dims": 48}, "output_proj_dims should be 40, not 48"),
        ({"model_patch_size": PATCH}, f"model_patch_size should be {PATCH * SIDE}, not {PATCH}"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(path, tmp_path, vision, words):
    copy_json(path, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] = vision and {**config["vision_config"], **vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        parse(tmp_path)


def test_there_is_no_tower_to_quantise(path):
    config = EngineConfig(model=str(path), encoder_quantization="fp8")
    with pytest.raises(ConfigError, match="Gemma4UnifiedForConditionalGeneration has no vision tower"):
        check_fit(config, parse(path)[1])


def test_rows_of_an_image_are_at_most_those_of_its_processor(path):
    assert {media_processor(path).check(size) for size in SIZES} <= set(range(1, ROWS + 1))
