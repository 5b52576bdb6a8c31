"""Tests of ColPali alone; ``test_laws.py`` and ``test_retrieval.py`` compare its vectors."""

from __future__ import annotations

import json

import pytest

from engine import LLM
from engine.errors import InvalidRequest
from tests.engine.families.colpali import make_colpali
from tests.engine.families.opened import check_refused, parse
from tests.engine.tiny import picture

#: As colpali-v1.2-hf states it.
PUBLIC = {
    "architectures": ["ColPaliForRetrieval"],
    "embedding_dim": 128,
    "model_type": "colpali",
    "torch_dtype": "bfloat16",
    "vlm_config": {
        "image_token_index": 257152,
        "model_type": "paligemma",
        "projection_dim": 2048,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "vocab_size": 257216,
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 448,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
}


def test_public_configuration_is_filled_up(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC))
    _, parsed = parse(tmp_path)
    assert parsed.decoder.head_dim == 256 and parsed.decoder.both_ways == "prompt"
    assert parsed.decoder.projected_width == 128 and parsed.decoder.activation == "gelu_pytorch_tanh"
    assert parsed.vision.rows_per_crop == 1024 and parsed.image_token_id == 257152


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        ("config.json", {"vlm_config": {"model_type": "paligemma2"}}, "vlm_config"),
        ("config.json", {"vlm_config": {"text_config": {"model_type": "gemma2"}}}, "text_config"),
        ("preprocessor_config.json", {"image_seq_length": 4}, "image_seq_length"),
        ("preprocessor_config.json", {"size": {"height": 20, "width": 20}}, "size"),
    ],
)
def test_files_that_cannot_be_followed_are_refused(tmp_path, file, fields, param):
    check_refused(make_colpali(tmp_path, hub=True), file, fields, param)


def test_a_prompt_that_no_step_holds_is_refused_by_what_to_change(tmp_path):
    llm = LLM(str(make_colpali(tmp_path, hub=False)), task="embed", max_num_batched_tokens=12)
    entry = {"prompt": "<image><bos>Look!\n", "multi_modal_data": {"image": picture(30, 30)}}
    with pytest.raises(InvalidRequest, match=r"attend to each other .*max_num_batched_tokens is 12"):
        llm.embed(entry, use_tqdm=False)
    llm.check_integrity()
