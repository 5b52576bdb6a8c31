"""Tests of Muse Glimmer alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

from engine.errors import CheckpointError, InvalidRequest
from engine.families.muse_glimmer.processor import fitted
from engine.kernels.fp8 import FP8, dequantise
from engine.media.video.sampling import FrameRules, muse_indices
from engine.media.video.video import VideoInfo, VideoOptions
from tests.engine.families.muse_glimmer import (
    HAS_MUSE_GLIMMER,
    make_muse_glimmer,
    video_processor_of,
)
from tests.engine.families.opened import check_refused, copy_json, encoder, media_processor, parse
from tests.engine.families.without_torchvision import imported
from tests.engine.fp8_files import Scheme, quantise
from tests.engine.quantised_files import MATRIX
from tests.engine.tiny import picture
from tests.engine.weights.checkpoints import load

pytestmark = pytest.mark.skipif(
    not HAS_MUSE_GLIMMER, reason="this release of Transformers has no Muse Glimmer"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_muse_glimmer(tmp_path_factory.mktemp("muse_glimmer"), hub=True)


def test_a_configuration_without_fields_is_that_of_transformers(tmp_path):
    config = {
        "architectures": ["MuseGlimmerForConditionalGeneration"],
        "text_config": {},
        "vision_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, model = parse(tmp_path)
    theirs = transformers.MuseGlimmerConfig()
    text, vision = theirs.text_config, theirs.vision_config
    decoder, tower = model.decoder, model.vision.tower
    assert (model.image_token_id, model.video_token_id) == (theirs.image_token_id, theirs.video_token_id)
    full = [index for index, kind in enumerate(text.layer_types) if kind == "full_attention"]
    assert [index for index, window in enumerate(decoder.windows) if window is None] == full
    assert [index for index, theta in enumerate(text.layer_rope_theta) if not theta] == full
    assert list(decoder.local_layers) == full and decoder.local_rope.turning == 0
    assert set(decoder.windows) == {text.sliding_window, None}
    for field in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps"):
        assert getattr(decoder, field) == getattr(text, field)
    assert (decoder.num_layers, decoder.num_heads, decoder.num_kv_heads) == (52, 32, 2)
    assert decoder.logits_multiplier == text.output_multiplier
    assert decoder.logits_cap == text.final_logit_softcapping and decoder.out_norm_eps == text.post_norm_eps
    named = [index for index, kind in enumerate(vision.layer_types) if kind == "full_attention"]
    assert list(tower.full_layers) == named and tower.num_layers == vision.num_hidden_layers
    assert (model.vision.window, model.vision.position_side) == (16, 32)
    assert not decoder.tie_word_embeddings and decoder.max_position == text.max_position_embeddings


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        ("config.json", {"text_config": {"model_type": "llama"}}, "text_config"),
        ("config.json", {"text_config": {"attention_bias": True}}, "attention_bias"),
        ("config.json", {"text_config": {"layer_rope_theta": [0]}}, "layer_rope_theta"),
        ("config.json", {"text_config": {"layer_rope_theta": 0}}, "layer_rope_theta"),
        ("config.json", {"text_config": {"layer_types": ["full_attention"]}}, "layer_types"),
        ("config.json", {"text_config": {"sliding_window": 0}}, "sliding_window"),
        ("config.json", {"out_hidden_size": 64}, "out_hidden_size"),
        ("config.json", {"projector_hidden_act": "tanh5"}, "projector_hidden_act"),
        ("config.json", {"vision_config": {"pos_emb_width": 3}}, "pos_emb_height"),
        ("config.json", {"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
        ("config.json", {"vision_config": {"layer_types": ["window"]}}, "vision_config"),
        ("preprocessor_config.json", {"max_image_tokens": 0}, "max_image_tokens"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size"),
        ("video_preprocessor_config.json", {"num_frames": "9"}, "num_frames"),
        (
            "video_preprocessor_config.json",
            {"frame_timestamp_format": "{timestamp!r:>9}"},
            "frame_timestamp_format",
        ),
    ],
    ids=str,
)
def test_files_that_are_not_supported_are_refused_by_name(path, tmp_path, file, fields, param):
    copy_json(path, tmp_path)
    stated = json.loads((tmp_path / file).read_text())
    nested = {key: {**stated[key], **value} for key, value in fields.items() if isinstance(value, dict)}
    check_refused(tmp_path, file, {**fields, **nested}, param)


def test_sizes_of_images_are_those_of_transformers():
    (module,) = imported("muse_glimmer.image_processing_muse_glimmer")
    draw = random.Random(0)
    edges = [
        (1, 1),
        (1, 199),
        (200, 1),
        (28, 28),
        (29, 27),
        (4000, 30),
        (30, 4000),
        (4000, 4000),
        (1792, 1792),
    ]
    drawn = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(3000)]
    compared = 0
    for width, height in (*edges, *drawn):
        if max(width, height) > 200 * min(width, height):
            continue
        for most in (1, 7, 144, 4096):
            theirs = module.smart_resize(height, width, 28, most)
            assert fitted((width, height), 28, 28**2, most * 28**2) == theirs[::-1], (width, height, most)
            compared += 1
    assert compared > 11000


def test_an_image_that_is_too_elongated_is_refused(path):
    with pytest.raises(InvalidRequest):
        media_processor(path).check((4000, 10))


def test_a_request_may_lower_the_number_of_rows(path):
    processor = media_processor(path)
    assert processor.check((200, 200)) == 36
    assert processor.with_options({"max_pixels": 9 * 64}).check((200, 200)) == 9


def test_frames_of_files_are_those_of_transformers(path):
    processor, draw = video_processor_of(path), random.Random(3)
    rules = FrameRules(2.0, max_frames=96, temporal=2)
    for _ in range(2000):
        total, rate = draw.randint(1, draw.choice((9, 400, 30000))), draw.choice((5, 24, 30, 30000 / 1001))
        fps, count = draw.choice(((None, None), (0.5, None), (5.0, None), (None, 7), (None, 300)))
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        theirs = processor.sample_frames(metadata, temporal_patch_size=2, num_frames=count, fps=fps).tolist()
        asked = VideoOptions(fps=fps, num_frames=count)
        assert muse_indices(VideoInfo(total, rate, (64, 48)), rules, asked) == theirs, (total, rate, asked)


def test_values_of_the_table_fall_to_0_beyond_its_outer_entries(path):
    vision = encoder(path)
    media = media_processor(path).prepare(picture(80, 32))
    with torch.inference_mode():
        vision.position_embedding.fill_(1.0)
        found = vision._positions([vision._plan(*media.item.grid[1:])])[:, 0]
    # As if the image were turned.
    w, h = media.item.grid[1:]
    table = torch.ones(1, 1, 4, 4)
    line = [(torch.arange(size) + 0.5) * 2 / size - 1 for size in (h, w)]
    grid = torch.stack(torch.meshgrid(line[1], line[0], indexing="xy"), dim=-1)[None]
    expected = torch.nn.functional.grid_sample(table, grid, align_corners=False, padding_mode="zeros")
    assert 0 < expected.min() < 1
    torch.testing.assert_close(found.sort().values, expected.flatten().sort().values)


def test_gates_in_fp8_have_their_own_scales(tmp_path):
    make_muse_glimmer(tmp_path)
    exact = quantise(tmp_path, Scheme(True, "block"), matrix=r"(?!.*vision)" + MATRIX)
    fused = load(tmp_path).layers[0].self_attn.qkv_proj
    names = (f"model.language_model.layers.0.self_attn.{part.name}.weight" for part in fused.parts)
    stored = torch.cat([exact[name] for name in names])
    assert fused.weight.dtype == FP8 and len(fused.parts) == 4
    torch.testing.assert_close(dequantise(fused.weight, fused.scale, torch.float32), stored)


def test_the_configuration_names_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["MuseSparkForConditionalGeneration"]}')
    with pytest.raises(CheckpointError, match="MuseSparkForConditionalGeneration is not supported"):
        parse(tmp_path)
