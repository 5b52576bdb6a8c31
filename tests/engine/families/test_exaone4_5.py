"""Tests of EXAONE 4.5 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json

import pytest
import transformers

from engine.errors import CheckpointError
from tests.engine.families.opened import parse

CONFIG = {
    "architectures": ["Exaone4_5_ForConditionalGeneration"],
    "text_config": {
        "model_type": "exaone4_5_text",
        "vocab_size": 153600,
        "hidden_size": 5120,
        "intermediate_size": 27392,
        "num_hidden_layers": 8,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e6,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "vision_config": {"hidden_size": 2048, "intermediate_size": 5120, "out_hidden_size": 5120, "depth": 28},
}


def test_a_configuration_of_public_sizes_is_filled_up(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    _, model = parse(tmp_path)
    decoder, tower = model.decoder, model.vision.tower
    theirs = transformers.AutoConfig.for_model("exaone4_5", **{**CONFIG, "architectures": None})
    assert (model.image_token_id, model.video_token_id) == (67, 68)
    assert (tower.num_heads, tower.num_kv_heads, tower.head_dim) == (16, 8, 128)
    assert tower.full_layers == (7, 15, 23, 31) and model.vision.window == 4
    full = [layer for layer, kind in enumerate(theirs.text_config.layer_types) if kind == "full_attention"]
    assert list(decoder.local_layers) == full == [3, 7]
    assert decoder.windows == (1024, 1024, 1024, None) * 2
    assert (decoder.rope.type, decoder.rope.mrope_section) == ("llama3", None)
    assert decoder.local_rope.turning == 0 and decoder.post_norm and decoder.qk_norm
    assert not decoder.tie_word_embeddings and decoder.rms_norm_eps == theirs.text_config.rms_norm_eps


def test_all_layers_rotate_where_there_are_no_windows(tmp_path):
    text = {**CONFIG["text_config"], "sliding_window": None, "layer_types": ["full_attention"] * 8}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "text_config": text}))
    decoder = parse(tmp_path)[1].decoder
    assert decoder.local_rope is None and decoder.local_layers == decoder.windows == ()


@pytest.mark.parametrize(
    ("part", "fields", "param"),
    [
        ("vision_config", {"num_key_value_heads": 5}, "vision_config"),
        ("vision_config", {"out_hidden_size": 4096}, "vision_config"),
        ("text_config", {"model_type": "qwen3"}, "text_config"),
        ("text_config", {"sliding_window": 0}, "sliding_window"),
        ("text_config", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_files_that_are_not_supported_are_refused_by_name(tmp_path, part, fields, param):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, part: {**CONFIG[part], **fields}}))
    with pytest.raises(CheckpointError) as refused:
        parse(tmp_path)
    assert refused.value.param == param
