"""Tests of the GLM families alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import random
from importlib import import_module

import pytest
import torch

from engine.errors import InvalidRequest
from engine.families.glm4v.family import FAMILY, first_times
from engine.media.video.video import Pace, Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem
from tests.engine.families import qwen
from tests.engine.families.case import CasePrompt
from tests.engine.families.glm import FRAME, SPECIALS, VIDEO, GlmReference, make_glm
from tests.engine.families.opened import check_refused, media_processor, parse
from tests.engine.tiny import picture

#: As GLM-4.1V-9B-Thinking states it.
PUBLIC = {
    "architectures": ["Glm4vForConditionalGeneration"],
    "image_token_id": 151343,
    "model_type": "glm4v",
    "text_config": {
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338, 151348],
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "max_position_embeddings": 65536,
        "model_type": "glm4v_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"mrope_section": [8, 12, 12], "type": "default"},
        "rope_theta": 10000.0,
        "vocab_size": 151552,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "video_token_id": 151344,
    "vision_config": {
        "depth": 24,
        "hidden_size": 1536,
        "image_size": 336,
        "in_channels": 3,
        "intermediate_size": 13696,
        "model_type": "glm4v_vision",
        "num_heads": 12,
        "out_hidden_size": 4096,
        "patch_size": 14,
        "rms_norm_eps": 1e-05,
    },
}


#: Experts of which a token has those of one group.
GROUPS = {
    "model_type": "glm4v_moe_text",
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
}


@pytest.fixture
def public(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC))
    return tmp_path


def test_public_configuration_is_filled_up(public):
    _, parsed = parse(public)
    rope = parsed.decoder.rope
    assert (rope.rotary_dim, rope.mrope_section, rope.adjacent) == (64, (8, 12, 12), True)
    assert parsed.decoder.qkv_bias and not parsed.decoder.o_bias and parsed.decoder.sandwich
    assert parsed.vision.position_side == 24 and parsed.vision.tower.intermediate_size == 4096
    assert parsed.vision.gated.intermediate_size == 13696
    assert parsed.eos_token_ids == (151329, 151336, 151338, 151348)


def test_2000_sizes_have_the_rows_of_transformers(public):
    """The largest image has half of the rows that its bound seems to allow: it counts as two frames."""
    ours = media_processor(public)
    theirs = import_module("transformers.models.glm4v.image_processing_pil_glm4v").Glm4vImageProcessorPil()
    drawn = random.Random(0)
    sizes = [(1, 1), (4000, 30), (30, 4000), (28, 28), (27, 5000), (20000, 20000), (8, 1500)]
    sizes += [(drawn.randint(1, 6000), drawn.randint(1, 6000)) for _ in range(2000)]
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(ValueError, match="aspect ratio"):
                theirs.get_number_of_image_patches(height, width)
            with pytest.raises(InvalidRequest, match="elongated"):
                ours.check((width, height))
        else:
            assert ours.check((width, height)) == theirs.get_number_of_image_patches(height, width) // 4
    assert ours.check((20000, 20000)) == 86 * 86 <= 7500


def test_bounds_by_the_names_of_qwen_are_not_read(tmp_path):
    path = make_glm(tmp_path) / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_pixels": 900, "max_pixels": 1000}))
    module = import_module("transformers.models.glm4v.image_processing_pil_glm4v")
    theirs = module.Glm4vImageProcessorPil.from_pretrained(tmp_path)
    grid = media_processor(tmp_path).prepare(picture(90, 60)).item.grid
    assert list(grid) == theirs([picture(90, 60)])["image_grid_thw"][0].tolist() == [1, 12, 18]


@pytest.mark.parametrize("kind", ["Glm4v", "Glm46V", "GlmOcr"])
def test_a_video_equals_its_steps_as_images(tmp_path, kind):
    """The laws' reference gives steps as images; the class computes a video alone in the same way."""
    reference = GlmReference(make_glm(tmp_path, kind=kind), kind)
    prompt = CasePrompt(FRAME.format("a " + VIDEO), frames=tuple(qwen.frames(5)))
    steps = dict(reference.inputs(prompt).arguments)
    whole = {name: value for name, value in steps.items() if name not in ("pixel_values", "image_grid_thw")}
    patches, grid = reference.video(prompt.frames)
    whole |= {"pixel_values_videos": patches, "video_grid_thw": grid}
    whole["mm_token_type_ids"] = 2 * steps["mm_token_type_ids"]
    with torch.inference_mode():
        one, other = (reference.model(**given).logits for given in (steps, whole))
    torch.testing.assert_close(one, other)
    assert int((steps["input_ids"] == SPECIALS.index("<|image|>")).sum()) == int(grid.prod()) // 4


@pytest.mark.parametrize(
    ("files", "tenths", "dense"),
    [
        ({}, False, False),
        # As GLM-4.6V-Flash names them.
        ({"preprocessor_config.json": ("Glm46VProcessor", "Glm46VImageProcessor")}, True, True),
        ({"preprocessor_config.json": ("Glm4vProcessor", "Glm4vImageProcessor")}, False, False),
        (
            {
                "processor_config.json": ("Glm46VProcessor", None),
                "preprocessor_config.json": ("Glm4vProcessor", "Glm4vImageProcessorFast"),
            },
            True,
            False,
        ),
        ({"tokenizer_config.json": ("Glm46VProcessor", None)}, True, False),
    ],
)
def test_files_of_glm_4_1v_may_name_the_processors_of_glm_4_6v(public, files, tenths, dense):
    """By the rules of Transformers' AutoProcessor and AutoVideoProcessor."""
    for name, (whole, images) in files.items():
        (public / name).write_text(json.dumps({"processor_class": whole, "image_processor_type": images}))
    _, parsed = parse(public)
    item = MediaItem.of_rows("video", "key", 9, 1, grid=(1, 2, 2), size=(28, 28), times=(1.26,))
    written = []
    FAMILY.placeholder(parsed, item, 0, lambda text: written.append(text) or [7])
    assert written[-1] == ("1.3 seconds" if tenths else "1")
    frames = media_processor(public).choose_frames(VideoInfo(120, 24.0, (28, 28)), VideoOptions())
    # Of 5 seconds, 6 a second or 2.
    assert len(frames) == (30 if dense else 10)


def test_times_are_those_of_the_first_frames():
    assert first_times(Pace.of_rate(5, 1.5), 2) == (0.0, pytest.approx(2 / 1.5), pytest.approx(4 / 1.5))


def test_times_are_those_of_every_other_frame_whatever_a_temporal_patch_has():
    assert first_times(Pace.of_rate(5, 1.0), 3) == (0.0, 2.0)
    assert first_times(Pace.of_rate(3, 1.0), 1) == (0.0, 2.0, 2.0)


def test_a_lone_frame_fills_a_step(tmp_path):
    make_glm(tmp_path)
    media = media_processor(tmp_path).prepare_video(Video.of(qwen.frames(1)))
    assert media.item.grid[0] == 1 and media.item.times == (0.0,)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text_config": {"model_type": "glm4_moe"}}, "text_config"),
        ({"text_config": {**GROUPS, "topk_group": 3}}, "n_group"),
        ({"text_config": {**GROUPS, "n_group": 3}}, "n_group"),
        ({"text_config": {**GROUPS, "n_group": 4, "n_routed_experts": 4}}, "n_group"),
        ({"text_config": {**GROUPS, "num_experts_per_tok": 5}}, "n_group"),
        ({"text_config": {**GROUPS, "n_shared_experts": 0}}, "n_shared_experts"),
        ({"vision_config": {"out_hidden_size": 32}}, "vision_config"),
        ({"vision_config": {"attention_bias": 3, "out_hidden_size": 64}}, "attention_bias"),
    ],
)
def test_files_that_cannot_be_followed_are_refused(tmp_path, fields, param):
    make_glm(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    changed = {name: stated[name] | part for name, part in fields.items()}
    check_refused(tmp_path, "config.json", changed, param)
