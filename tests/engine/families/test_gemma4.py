"""Gemma 4: patches and rows by size, the fields of its files, and what is refused by name."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention, Gemma4TextRotaryEmbedding
from transformers.video_utils import VideoMetadata

from engine.errors import CheckpointError, InvalidRequest
from engine.families.gemma4.family import FAMILY
from engine.families.parsing.decoder import parse_decoder
from engine.layers.layer_groups import LayerGroups
from engine.layers.rotary import inverse_frequencies
from engine.media.video.video import Pace, Video
from tests.engine.families.gemma4 import FRAME_ROWS, PATCH, ROWS, SIDE, Gemma4Reference, make_gemma4
from tests.engine.families.opened import copy_json, encoder, media_processor, parse
from tests.engine.families.without_torchvision import imported
from tests.engine.tiny import picture

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = [(60, 44), (44, 61), (7, 300), (300, 7), (8, 8), (1, 1), (500, 333), (24, 32)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_gemma4(tmp_path_factory.mktemp("gemma4"))


@pytest.mark.parametrize("options", [{}, {"max_soft_tokens": 5}], ids=str)
def test_patches_are_those_of_transformers(path, options):
    """In another order: those of a square lie together."""
    ours, theirs = media_processor(path, **options), Gemma4Reference(path, **options).images
    vision = encoder(path)
    for size in SIZES:
        image = picture(*size)
        made = theirs([image], return_tensors="pt")
        prepared = ours.prepare(image)
        _, height, width = prepared.item.grid
        columns, rows = vision._places(height, width)
        places = made["image_position_ids"][0]
        real = (places >= 0).all(-1)
        assert torch.equal(
            places[real],
            torch.stack([torch.arange(height * width) % width, torch.arange(height * width) // width], 1),
        )
        pixels = 2 * (made["pixel_values"][0][real] - 0.5)
        found = vision.pixels.last(torch.from_numpy(prepared.pixels))
        assert torch.equal(found, pixels.float()[rows * width + columns]), size
        assert prepared.item.num_tokens == made["num_soft_tokens_per_image"][0] == ours.check(size)


@pytest.mark.parametrize("rows", [70, 280, 1120])
def test_sides_are_those_of_transformers(path, rows):
    (module,) = imported("gemma4.image_processing_pil_gemma4")
    draw, ours, refused = random.Random(rows), media_processor(path, max_soft_tokens=rows), 0
    for _ in range(400):
        width, height = (int(2 ** draw.uniform(0, 14)) for _ in range(2))
        try:
            expected = module.get_aspect_ratio_preserving_size(height, width, PATCH, rows * SIDE**2, SIDE)
        except ValueError:
            refused += 1
            with pytest.raises(InvalidRequest, match="too small"):
                ours.grid((width, height))
            continue
        assert ours.grid((width, height)) == (1, *(side // PATCH for side in expected)), (width, height)
    assert refused < 40


def test_frames_have_their_times(path):
    reference, ours = Gemma4Reference(path), media_processor(path)
    frames = [picture(40, 56, number) for number in range(3)]
    times = (0.0, 59.96, 3671.2)
    item = ours.prepare_video(Video.of(frames, Pace.of_times(times))).item
    assert item.times == times and item.num_tokens == 3 * (item.num_tokens // 3) <= 3 * FRAME_ROWS
    metadata = VideoMetadata(total_num_frames=10**6, fps=25.0, frames_indices=[0, 1499, 91780])
    text = reference.placeholder(item.num_tokens // 3, frames, metadata)
    before, behind = FAMILY.around(parse(path)[1], item)
    assert text.startswith(before + "<|image>") and behind == ""
    texts = list[str]()
    FAMILY.placeholder(parse(path)[1], item, 0, lambda part: texts.append(part) or [])
    # Each frame with one row in the place of all.
    assert before + texts[0] == text.replace("<|video|>" * (item.num_tokens // 3), "<|video|>")
    assert " 00:59 <|image>" in text and " 61:11 <|image>" in text
    # Equal frames at other times are another item.
    later = ours.prepare_video(Video.of(frames, Pace.of_times((0.0, 1.0, 2.0)))).item
    assert later.hash != item.hash


def test_requests_lower_the_rows(path):
    ours = media_processor(path)
    assert ours.check((60, 44)) <= ROWS
    fewer = ours.with_options({"max_soft_tokens": 4})
    assert fewer.check((60, 44)) <= 4 and fewer.check_video((60, 44), 3) <= 12
    low = media_processor(path, max_soft_tokens=280).low_detail()
    assert (low.rows, low.frame_rows) == (70, 70)
    with pytest.raises(InvalidRequest, match="max_soft_tokens"):
        ours.with_options({"max_soft_tokens": ROWS + 1})


def test_a_model_without_sound_need_not_have_a_token_for_it(path, tmp_path):
    copy_json(path, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "audio_token_id": None}))
    tokens = config["image_token_id"], config["video_token_id"]
    assert parse(path)[1].decoder.media_tokens == (*tokens, config["audio_token_id"])
    assert parse(tmp_path)[1].decoder.media_tokens == tokens


BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 7,
    "sliding_window": 9,
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"global_head_dim": 32},
        {"global_head_dim": 32, "num_global_key_value_heads": 2},
        {"global_head_dim": 32, "num_global_key_value_heads": 2, "attention_k_eq_v": True},
        {"num_global_key_value_heads": None, "attention_k_eq_v": True},
        {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]},
        {"layer_types": [FULL, SLIDING, FULL, FULL, SLIDING, SLIDING, FULL], "num_kv_shared_layers": 3},
        {"num_kv_shared_layers": 1, "use_double_wide_mlp": True, "layer_types": [FULL] * 7},
        {
            "rope_parameters": {
                FULL: {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.3,
                    "rope_theta": 4e4,
                    "factor": 8,
                },
                SLIDING: {"rope_type": "default", "rope_theta": 90.0},
            }
        },
    ],
    ids=str,
)
def test_fields_mean_what_they_mean_in_transformers(fields):
    raw = {**BASE, **fields}
    theirs = Gemma4TextConfig(**json.loads(json.dumps(raw)))
    # As they are stated, and as Transformers writes them.
    for stated in (raw, theirs.to_dict()):
        ours = parse_decoder(stated, "gemma4_text")
        kinds, layers = theirs.layer_types, range(7)
        assert [layer in ours.local_layers for layer in layers] == [kind == SLIDING for kind in kinds]
        heads = [theirs.per_layer_config[layer] for layer in layers]
        assert [ours.heads_of(layer) for layer in layers] == [
            (each.num_key_value_heads, each.head_dim) for each in heads
        ]
        attention = [Gemma4TextAttention(theirs, layer) for layer in layers]
        borrows = [each.is_kv_shared_layer for each in attention]
        assert [ours.keys_of(layer) != layer for layer in layers] == borrows
        lenders = {ours.keys_of(layer) for layer in ours.borrowing_layers}
        assert all(attention[layer].store_full_length_kv for layer in lenders)
        assert all(kinds[layer] == kinds[ours.keys_of(layer)] for layer in layers)
        assert all(ours.window(layer) == ours.window(ours.keys_of(layer)) for layer in layers)
        rotary = Gemma4TextRotaryEmbedding(theirs)
        for rope, kind in ((ours.rope, FULL), (ours.local_rope, SLIDING)):
            if kind in kinds:
                dim = heads[kinds.index(kind)].head_dim
                expected = getattr(rotary, f"{kind}_inv_freq")
                torch.testing.assert_close(inverse_frequencies(rope, dim, length=1), expected)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5}, "top_k_experts"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 2, "layer_types": [SLIDING] * 6 + [FULL]}, "num_kv_shared_layers"),
        ({"per_layer_config": {"6": {"head_dim": 8}, "0": {"head_dim": 8}}}, "per_layer_config"),
        ({"per_layer_config": {"6": {"sliding_window": 8}}}, "per_layer_config"),
        ({"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input"),
        ({"layer_types": [FULL]}, "layer_types"),
        ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "rope_scaling"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(fields, named):
    with pytest.raises(CheckpointError) as error:
        parse_decoder({**BASE, **fields}, "gemma4_text")
    assert error.value.param == named


def test_layers_with_narrow_keys_share_places():
    """Of 31B: layers with full attention have keys half as wide, on any number of ranks that divides them."""
    raw = {"num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16}
    raw |= {"num_global_key_value_heads": 4, "attention_k_eq_v": True, "sliding_window": 1024}
    decoder = parse_decoder(raw, "gemma4_text")
    for ranks, pairs in ((1, 5), (4, 5), (8, 10)):
        groups = LayerGroups.of(decoder, 1 << 17, ranks)
        places = [place for members in groups.members for place in members]
        assert sorted(layer for place in places for layer in place) == list(range(60))
        full = [place for place in places if place[0] not in decoder.local_layers]
        assert len(full) == pairs and groups.width == 16 * 256 // ranks
        assert all(
            decoder.kv_width(layer, ranks) * len(place) == groups.width for place in full for layer in place
        )
        # The memory of a token far behind all windows is that of the layers with full attention.
        kept = sum(window is None for window in groups.windows) * groups.size * groups.width
        assert kept == sum(decoder.kv_width(layer, ranks) for layer in range(5, 60, 6))


def test_layers_that_borrow_keep_nothing():
    """Of E2B, whose layers with full attention have keys twice as wide as the others."""
    kinds = [SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 7
    raw = {
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "layer_types": kinds,
        "num_kv_shared_layers": 20,
    }
    groups = LayerGroups.of(parse_decoder(raw, "gemma4_text"), 1 << 15)
    assert groups.size == 3 and groups.width == 512
    assert groups.members == (((0, 1), (2, 3), (5, 6)), ((7, 8), (10, 11), (12, 13)), ((4,), (9,), (14,)))
