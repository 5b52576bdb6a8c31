"""Tests of LLaVA-OneVision alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import ConfigError, InvalidRequest
from engine.media.video.video import Video
from engine.prompt import PreparedMedia
from tests.engine.families.onevision import make_onevision
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.tiny import picture


@pytest.fixture(scope="module", params=[False, True], ids=["saved", "hub"])
def path(request, tmp_path_factory) -> Path:
    return make_onevision(tmp_path_factory.mktemp("onevision"), request.param)


def test_public_configuration_is_filled_up(tmp_path):
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_token_index": 151646,
        "model_type": "llava_onevision",
        "text_config": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 152000,
        },
        "torch_dtype": "float16",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, parsed = parse(tmp_path)
    assert parsed.decoder.tie_word_embeddings and parsed.dtype == "float16"
    assert parsed.vision.crops.tower.num_layers == 26 and parsed.vision.crops.rows_per_crop == 729
    assert len(parsed.vision.pinpoints) == 36
    # 2304x2304 pixels are 162x162 features: shrunk to 9 crops' worth.
    processor = media_processor(tmp_path)
    assert processor.check((2304, 2304)) == 729 + 81 * 82
    assert processor.among(2).check((2304, 2304)) == 730


def test_refusals(path):
    ours = media_processor(path)
    with pytest.raises(InvalidRequest, match="same size"):
        ours.prepare_video(Video.of([picture(8, 8), picture(8, 9)]))
    with pytest.raises(ConfigError, match="num_crops"):
        media_processor(path, num_crops=3)
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels[:-1])])
