"""Tests of Ovis2 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import importlib
import json
import random

import numpy as np
import pytest

from engine import LLM
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.ovis2.processor import covering_tiling
from engine.families.tiles import best_tiling
from engine.prompt import PreparedMedia
from tests.engine.families.case import CasePrompt
from tests.engine.families.made import check_answer
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.families.ovis2 import SIDE, Ovis2Reference, make_ovis2
from tests.engine.tiny import picture


def test_a_configuration_of_public_sizes_is_filled_up(tmp_path):
    config = {
        "architectures": ["Ovis2ForConditionalGeneration"],
        "model_type": "ovis2",
        "hidden_size": 896,
        "vocab_size": 151936,
        "text_config": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_stride": 2, "image_size": 448, "model_type": "ovis2_vision"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, model = parse(tmp_path)
    assert model.image_token_id == 151665
    assert model.extra == {"indicators": (151666, 151667, 151668, 151669, 151670)}
    assert model.decoder.tie_word_embeddings
    tower = model.vision.tower
    assert (tower.hidden_size, tower.intermediate_size, tower.num_layers, tower.num_heads) == (
        1024,
        2816,
        24,
        8,
    )
    assert not tower.bias and not tower.mlp_bias and tower.activation == "silu"
    assert model.vision.rows_per_crop == 256
    assert (model.vision.vocabulary.words, model.vision.vocabulary.hard) == (16384, False)


def transformers_tilings():
    return importlib.import_module("transformers.models.ovis2.image_processing_pil_ovis2")


def test_2000_sizes_have_the_tilings_of_transformers():
    theirs, drawn = transformers_tilings(), random.Random(0)
    sizes = [(1, 1), (4000, 30), (30, 4000), (448, 448), (449, 448), (896, 448)]
    sizes += [(drawn.randint(1, 3000), drawn.randint(1, 3000)) for _ in range(2000)]
    for size in sizes:
        side, most = drawn.choice([25, 448]), drawn.choice([2, 9, 12])
        theirs_of_size = theirs.get_min_tile_covering_grid(size[::-1], side, most)
        assert covering_tiling(size, side, most) == theirs_of_size, size
        canvas = theirs.get_optimal_tiled_canvas(size[::-1], (side, side), 1, most)
        assert best_tiling(size, side, 1, most) == canvas, size


def test_sizes_have_the_tokens_of_transformers(tmp_path):
    path = make_ovis2(tmp_path)
    ours, theirs = media_processor(path), Ovis2Reference(path).processor
    for size in ((1, 1), (4000, 30), (30, 4000), (25, 25), (26, 25), (50, 25), (200, 180), (61, 97)):
        made = theirs(text="<image>", images=[picture(*size)], return_tensors="pt")
        assert ours.check(size) == len(made["input_ids"][0]), size


@pytest.mark.parametrize(
    "variant",
    [
        {"text": "qwen3", "qkv_bias": True},
        {"text": "llama", "mlp_bias": True, "hidden_stride": 4},
        {"tokenize_function": "st_argmax", "hidden_stride": 1, "rms_norm_eps": 1e-3, "hidden_act": "gelu"},
    ],
    ids=["biases of attention", "biases of the MLP", "the likeliest word alone"],
)
def test_other_towers_and_decoders_equal_transformers(tmp_path, variant):
    path = make_ovis2(tmp_path, **variant)
    prompt = CasePrompt("what is shown? <image>\nand <image>", (picture(70, 45), picture(20, 20)))
    check_answer(path, prompt, Ovis2Reference(path).inputs(prompt))


def test_tiles_by_request(tmp_path):
    ours = media_processor(make_ovis2(tmp_path))
    # The whole and two tiles of 4 rows each, with two ends, the grid's word and one between the tiles.
    assert ours.check((2 * SIDE, SIDE)) == 3 * 4 + 4
    whole = ours.with_options({"crop_to_patches": False})
    assert ours.low_detail().check((2 * SIDE, SIDE)) == whole.check((2 * SIDE, SIDE)) == 4 + 3
    assert ours.with_options({"max_patches": 2}).check((SIDE, 4 * SIDE)) == 3 * 4 + 4
    with pytest.raises(InvalidRequest, match="max_patches"):
        ours.with_options({"max_patches": 7})
    with pytest.raises(ConfigError, match="crop_to_patches"):
        media_processor(tmp_path, crop_to_patches=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 7, "vocab_size 7 differs"),
        ("hidden_size", 32, "hidden_size 32 differs"),
        ("visual_indicator_token_ids", [5, 6, 7, 8], "should be 5 ids"),
        ("vision_config", {"tokenize_function": "gumbel_argmax"}, "tokenize_function 'gumbel_argmax'"),
        ("vision_config", {"hidden_stride": 3}, "hidden_stride 3 does not divide the 4 patches"),
        ("vision_config", {"num_channels": 1}, "num_channels should be 3"),
        ("vision_config", {"num_visual_indicator_tokens": 6}, "num_visual_indicator_tokens should be 5"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused_by_name(tmp_path, field, value, message):
    make_ovis2(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config[field] = config[field] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        parse(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"height": 30, "width": 30}}, "size should be the tower's 25 pixels"),
    ],
)
def test_a_processor_that_is_not_supported_is_refused_by_name(tmp_path, fields, message):
    make_ovis2(tmp_path, hub=True)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message):
        media_processor(tmp_path)


def test_ids_of_words_that_mark_parts_must_be_the_tokenizers(tmp_path):
    make_ovis2(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["visual_indicator_token_ids"].reverse()
    file.write_text(json.dumps(config))
    llm = LLM(str(tmp_path), max_model_len=256)
    with pytest.raises(CheckpointError, match="should be the ids of <IMG_START>"):
        llm.generate(CasePrompt("<image>", (picture(20, 20),)).entry, use_tqdm=False)


def test_pixels_that_contradict_their_grid_are_refused(tmp_path):
    path = make_ovis2(tmp_path)
    prepared, vision = media_processor(path).prepare(picture(60, 25)), encoder(path)
    (rows,) = vision.encode([prepared])
    assert rows.shape == (prepared.item.num_tokens, 64)
    fewer = PreparedMedia(prepared.item, np.ascontiguousarray(prepared.pixels[1:]))
    with pytest.raises(InvalidRequest, match="do not fit grid"):
        vision.encode([fewer])
