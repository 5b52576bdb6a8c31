"""What is LLaVA-OneVision's own; ``test_laws.py`` compares whole answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.llava_onevision.family import FAMILY
from engine.families.load import load_vision_encoder
from engine.prompt import PreparedMedia
from tests.engine.families.onevision import PATCH, make_onevision
from tests.engine.tiny import picture, rewrite_json

SIZES = [(60, 44), (44, 60), (1, 1), (2, 1), (32, 32), (96, 96), (29, 97), (200, 180), (4000, 30), (30, 4000)]


@pytest.fixture(scope="module", params=[False, True], ids=["saved", "hub"])
def path(request, tmp_path_factory) -> Path:
    return make_onevision(tmp_path_factory.mktemp("onevision"), request.param)


def parse(path):
    checkpoint = Checkpoint.open(str(path))
    return checkpoint, FAMILY.parse(checkpoint)


def media_processor(path, **options):
    return FAMILY.media_processor(*parse(path), options)


def encoder(path):
    return load_vision_encoder(*parse(path), device=torch.device("cpu"), dtype=torch.float32)


def reference_image_processor(path):
    return transformers.LlavaOnevisionImageProcessorPil.from_pretrained(path)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_prepared_as_transformers_does(path, size, several):
    images = [picture(*size), picture(*size, 1)] if several else [picture(*size)]
    theirs = reference_image_processor(path)([images], return_tensors="pt")["pixel_values"]
    ours = media_processor(path).among(len(images))
    media = [ours.prepare(image) for image in images]
    assert all(entry.item.num_tokens == ours.check(size) for entry in media)
    crops = torch.from_numpy(np.concatenate([entry.pixels for entry in media]))
    expected = torch.nn.functional.unfold(theirs.flatten(0, 1), kernel_size=PATCH, stride=PATCH)
    patches = encoder(path).crops.patchify(crops)
    torch.testing.assert_close(patches, expected.transpose(1, 2).flatten(0, 1), atol=0, rtol=0)


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
        ours.prepare_video([picture(8, 8), picture(8, 9)])
    with pytest.raises(ConfigError, match="num_crops"):
        media_processor(path, num_crops=3)
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels[:-1])])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text_config": {"model_type": "llama"}}, "llama"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "clip"),
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer"),
        ({"vision_feature_layer": -9}, "vision_feature_layer"),
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio"),
        ({"image_grid_pinpoints": [[32, 33]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[32, 32]]}, "image_grid_pinpoints"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused_by_field(tmp_path, change, field):
    path = make_onevision(tmp_path)
    rewrite_json(path / "config.json", change)
    with pytest.raises(CheckpointError, match=field):
        media_processor(path)
