"""Tests of DeepSeek-OCR 2 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.errors import CheckpointError, InvalidRequest
from engine.families.deepseek_ocr2 import encoder as deepseek_encoder
from engine.inputs.messages import parse_messages
from engine.model_parts import load_prompt_builder
from engine.prompt import PreparedMedia
from tests.engine.families.case import CasePrompt
from tests.engine.families.deepseek_ocr2 import (
    PATCH,
    TILE,
    WHOLE,
    DeepseekReference,
    image_processor,
    make_deepseek_ocr2,
)
from tests.engine.families.opened import check_refused, copy_json, encoder, media_processor, parse
from tests.engine.families.test_prepared_images import unfolded
from tests.engine.rerun import rerun
from tests.engine.tiny import TRANSFORMERS, picture

#: Of the public model.
_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekOcr2ForConditionalGeneration"],
    "model_type": "deepseek_ocr2",
    "text_config": {
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "max_position_embeddings": 8192,
        "mlp_layer_types": ["dense"] + ["sparse"] * 11,
        "moe_intermediate_size": 896,
        "num_attention_heads": 10,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 12,
        "vocab_size": 129280,
    },
    "vision_config": {
        "encoder_config": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
        },
        "sam_config": {"model_type": "deepseek_ocr2_sam_vision_model"},
    },
}
_TILE = {"height": TILE, "width": TILE}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_deepseek_ocr2(tmp_path_factory.mktemp("deepseek"), hub=True)


def test_a_configuration_of_public_sizes_is_filled_up(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    _, model = parse(tmp_path)
    vision, experts = model.vision, model.decoder.experts
    assert (vision.tile_side, vision.whole_side) == (768, 1024)
    assert (vision.tower.hidden_size, vision.tower.intermediate_size) == (768, 3072)
    assert (vision.tower.neck, vision.tower.reduced) == (256, (512, 896))
    assert (vision.encoder.num_layers, vision.encoder.rope_theta) == (24, 1e6)
    assert vision.rows(6) == 6 * 144 + 257 and vision.rows(0, small=True) == 145
    assert experts.layers == tuple(range(1, 12)) and experts.shared_size == 2 * 896
    assert (experts.router.num_experts, experts.router.top_k) == (64, 6)
    assert not experts.router.renormalise and experts.router.scoring == "softmax"
    assert model.image_token_id == 128815 and not model.decoder.tie_word_embeddings


def test_the_publishers_configuration_is_that_of_transformers(tmp_path):
    text = _CONFIG["text_config"]
    published = {
        "architectures": ["DeepseekOCR2ForCausalLM"],
        "candidate_resolutions": [[1024, 1024]],
        "language_config": {
            **{field: value for field, value in text.items() if field != "mlp_layer_types"},
            "first_k_dense_replace": 1,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "topk_group": 1,
            "topk_method": "greedy",
            "use_mla": False,
        },
        "model_type": "deepseek_vl_v2",
        "projector_config": {"input_dim": 896, "n_embed": 1280, "projector_type": "linear"},
        "vision_config": {
            "image_size": 1024,
            "mlp_ratio": 3.7362,
            "model_name": "deepencoderv2",
            "model_type": "vision",
            "width": {
                "qwen2-0-5b": {"dim": 896},
                "sam_vit_b": {
                    "downsample_channels": [512, 1024],
                    "global_attn_indexes": [2, 5, 8, 11],
                    "heads": 12,
                    "layers": 12,
                    "width": 768,
                },
            },
        },
    }
    found = []
    for name, config in (("ours", _CONFIG), ("theirs", published)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        found.append(parse(tmp_path / name)[1])
    assert found[0].vision == found[1].vision and found[0].decoder == found[1].decoder
    assert found[1].image_token_id == 128815
    (tmp_path / "theirs" / "config.json").write_text(
        json.dumps({**published, "language_config": {**published["language_config"], "use_mla": True}})
    )
    with pytest.raises(CheckpointError, match="use_mla"):
        parse(tmp_path / "theirs")


def test_rows_of_tiles_and_the_whole_are_those_of_transformers(path, monkeypatch):
    """With a layer over whole squares, whose tables are stretched for tiles; and captured, where the whole is
    alone and tiles aren't."""
    monkeypatch.setattr(deepseek_encoder, "_TILES", 1)
    monkeypatch.setattr(deepseek_encoder, "_WHOLES", 1)
    sizes = ((60, 44), (97, 50))
    theirs, ours, vision = DeepseekReference(path), media_processor(path), encoder(path)
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    media = [ours.prepare(image) for image in images]
    made = theirs.processor.image_processor(images, return_tensors="pt")
    assert made["num_local_patches"].tolist() == [entry.item.grid[0] - 1 for entry in media] == [0, 2]
    with torch.inference_mode():
        wanted = theirs.model.get_image_features(**made).pooler_output
    for rows, expected in zip(vision.encode(media), wanted, strict=True):
        torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)
    vision.capture_graphs(rerun)
    for entry, expected in zip(media, wanted, strict=True):
        (rows,) = vision.encode([entry])
        torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"max_patches": 1}, {"max_patches": 12}, {"crop_to_patches": False}])
def test_pixels_are_those_of_transformers(path, options):
    ours, vision = media_processor(path, **options), encoder(path)
    theirs = image_processor().from_pretrained(path)
    drawn = random.Random(5)
    sizes = [(1, 1), (96, 96), (97, 96), (96, 40), (29, 97), (641, 480), (2000, 30), (30, 2000), (129, 400)]
    sizes += [(drawn.randint(1, 400), drawn.randint(40, 400)) for _ in range(3)]
    for size in sizes:
        image = picture(*size)
        made = theirs([image], return_tensors="pt", **options)
        squares = [made[name] for name in ("pixel_values_local", "pixel_values") if name in made]
        patches = vision.patchify(torch.from_numpy(ours.prepare(image).pixels))
        assert torch.equal(patches, torch.cat([unfolded(part, PATCH) for part in squares])), size


@pytest.mark.skipif(TRANSFORMERS < (5, 23), reason="earlier processors have no text of a single image")
def test_2000_sizes_have_the_rows_of_transformers(path):
    ours, theirs = media_processor(path), DeepseekReference(path).processor
    drawn = random.Random(0)
    for _ in range(2000):
        size = drawn.randint(1, 3000), drawn.randint(1, 3000)
        crops = theirs.image_processor.get_number_of_image_patches(*size[::-1], {"patch_size": _TILE})
        local = crops - 1 if max(size) > TILE else 0
        expected = theirs.replace_image_token({"num_local_patches": [local]}, 0).count("<image>")
        if round(WHOLE / max(size) * min(size)):
            assert ours.check(size) == expected, size
        else:
            with pytest.raises(InvalidRequest, match="too elongated"):
                ours.check(size)


def test_the_image_processors_file_states_no_limits(tmp_path):
    """As in Transformers, whose whole processor has options of its own."""
    make_deepseek_ocr2(
        tmp_path, hub=True, processor={"crop_to_patches": False, "max_patches": 3, "min_patches": 1}
    )
    size = 6 * TILE, TILE
    ids = DeepseekReference(tmp_path).inputs(CasePrompt("<image>", (picture(*size),))).ids
    assert len(ids) == media_processor(tmp_path).check(size) == 6 * 144 + 257


def test_options_of_a_request(path):
    ours, large = media_processor(path), (6 * TILE, TILE)
    assert ours.low_detail().check(large) == ours.with_options({"crop_to_patches": False}).check(large) == 145
    assert ours.with_options({"max_patches": 2}).check(large) == 2 * 144 + 257
    with pytest.raises(InvalidRequest, match="max_patches"):
        ours.with_options({"max_patches": 7})


def test_a_small_whole_image_has_the_rows_of_a_tile(path):
    """The class computes them, though the processor of Transformers writes tokens for a large one."""
    theirs, vision, image = DeepseekReference(path), encoder(path), picture(200, 50)
    made = theirs.processor.image_processor([image], crop_to_patches=False, return_tensors="pt")
    with torch.inference_mode():
        (wanted,) = theirs.model.get_image_features(**made).pooler_output
    (rows,) = vision.encode([media_processor(path).low_detail().prepare(image)])
    assert rows.shape == wanted.shape == (145, 64)
    torch.testing.assert_close(rows, wanted, rtol=1e-3, atol=1e-3)


def test_a_chat_is_an_image_and_a_task(path):
    theirs, image = DeepseekReference(path), picture(40, 30)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Free OCR."}]
    parsed, sources = parse_messages([{"role": "user", "content": content}])
    items = [media_processor(path).prepare(source.image).item for source in sources]
    builder = load_prompt_builder(EngineConfig(model=str(path)))
    expected = theirs.inputs(CasePrompt("<bos><image>\nFree OCR.", (image,))).ids
    assert builder.from_messages(parsed, items).token_ids == expected


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        (
            "config.json",
            {"vision_config": {"sam_config": {"downsample_channels": [12]}}},
            "downsample_channels",
        ),
        ("config.json", {"vision_config": {}}, "downsample_channels"),
        ("preprocessor_config.json", {"size": {"height": 96, "width": 96}}, "size"),
        ("preprocessor_config.json", {"tile_size": 128}, "tile_size"),
        ("preprocessor_config.json", {"background_color": 127}, "background_color"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(path, tmp_path, file, fields, param):
    copy_json(path, tmp_path)
    check_refused(tmp_path, file, fields, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"topk_method": "group_limited_greedy"}, "topk_method"),
        ({"mlp_layer_types": ["dense", "linear", "sparse"]}, "mlp_layer_types"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"model_type": "deepseek_v2"}, "text_config"),
    ],
)
def test_another_decoder_is_refused_by_name(path, tmp_path, fields, param):
    copy_json(path, tmp_path)
    text = json.loads((path / "config.json").read_text())["text_config"]
    check_refused(tmp_path, "config.json", {"text_config": {**text, **fields}}, param)


def test_pixels_that_contradict_their_grid_are_refused(path):
    prepared, vision = media_processor(path).prepare(picture(60, 25)), encoder(path)
    for pixels in (prepared.pixels[1:], prepared.pixels.astype(np.int16)):
        with pytest.raises(InvalidRequest, match="do not fit grid"):
            vision.encode([PreparedMedia(prepared.item, pixels)])
