"""Tests of Idefics3 and SmolVLM alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from engine.errors import ConfigError, InvalidRequest
from engine.families.idefics3.video import number_in_words
from engine.media.video.video import Video
from engine.prompt import PreparedMedia
from engine.vision.bucketed_positions import bucketed_positions
from tests.engine.families.cases import case_named
from tests.engine.families.idefics import WORDS, make_granite_docling, make_idefics3, make_smolvlm
from tests.engine.families.made import Made
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.tiny import picture


@pytest.fixture(scope="module", params=["Idefics3", "SmolVLM"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(kind, tmp_path_factory) -> Path:
    make = {"Idefics3": make_idefics3, "SmolVLM": make_smolvlm}[kind]
    return make(tmp_path_factory.mktemp(kind))


@pytest.mark.parametrize("side", [6, 25, 26, 32])
@pytest.mark.parametrize("shape", [(1, 1), (25, 49), (27, 26), (32, 3)], ids=str)
def test_positions_are_those_of_transformers(side, shape):
    height, width = shape
    config = transformers.Idefics3Config(
        vision_config={"hidden_size": 1, "num_attention_heads": 1, "image_size": side, "patch_size": 1}
    ).vision_config
    module = Idefics3VisionEmbeddings(config)
    module.patch_embedding.weight.data.zero_()
    module.patch_embedding.bias.data.zero_()
    module.position_embedding.weight.data = torch.arange(float(side**2))[:, None]
    with torch.inference_mode():
        wanted = module(torch.zeros(1, 3, height, width), torch.ones(1, height, width, dtype=torch.bool))
    assert bucketed_positions(height, width, side).tolist() == wanted.flatten().tolist()


@pytest.mark.parametrize("hub", [False, True], ids=["saved", "hub"])
def test_granite_docling(tmp_path, hub):
    Made(replace(case_named("Idefics3"), make=make_granite_docling), tmp_path / "made", hub).check_all()


def test_public_configuration_is_filled_up(tmp_path):
    """SmolVLM-256M's files state few fields of the tower."""
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 49190,
        "model_type": "idefics3",
        "scale_factor": 4,
        "text_config": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rope_theta": 100000,
            "vocab_size": 49280,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 768,
            "image_size": 512,
            "model_type": "idefics3",
            "num_attention_heads": 12,
            "patch_size": 16,
            "size": {"longest_edge": 2048},
        },
    }
    preprocessor = {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}, "resample": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    _, parsed = parse(tmp_path)
    tower = parsed.vision.tower
    assert (tower.num_layers, tower.intermediate_size, tower.num_positions) == (12, 3072, 1024)
    assert parsed.vision.rows_per_crop == 64 and parsed.decoder.rms_norm_eps == 1e-6
    assert media_processor(tmp_path).grid((1600, 1200)) == (13, 3, 4)
    assert media_processor(tmp_path, size={"longest_edge": 512}).grid((1600, 1200)) == (1, 0, 0)


def test_refusals(path, kind):
    ours = media_processor(path)
    if kind == "Idefics3":
        with pytest.raises(InvalidRequest, match="frames"):
            ours.prepare_video(Video.of([picture(8, 8)]))
    for options in ({"num_crops": 3}, {"size": {"longest_edge": 0}}, {"do_image_splitting": 1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            media_processor(path, **options)
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels[:-1])])


#: Where a field of config.json is ours: of the tower, the decoder, or the whole.
_READ = {
    "vision_config.hidden_size": lambda config: config.vision.tower.hidden_size,
    "vision_config.intermediate_size": lambda config: config.vision.tower.intermediate_size,
    "vision_config.num_hidden_layers": lambda config: config.vision.tower.num_layers,
    "vision_config.num_attention_heads": lambda config: config.vision.tower.num_heads,
    "vision_config.hidden_act": lambda config: config.vision.tower.activation,
    "vision_config.layer_norm_eps": lambda config: config.vision.tower.norm_eps,
    "vision_config.patch_size": lambda config: config.vision.patch_size,
    "text_config.hidden_size": lambda config: config.decoder.hidden_size,
    "text_config.intermediate_size": lambda config: config.decoder.intermediate_size,
    "text_config.num_hidden_layers": lambda config: config.decoder.num_layers,
    "text_config.num_attention_heads": lambda config: config.decoder.num_heads,
    "text_config.num_key_value_heads": lambda config: config.decoder.num_kv_heads,
    "text_config.rms_norm_eps": lambda config: config.decoder.rms_norm_eps,
    "text_config.max_position_embeddings": lambda config: config.decoder.max_position,
    "text_config.vocab_size": lambda config: config.decoder.vocab_size,
    "tie_word_embeddings": lambda config: config.decoder.tie_word_embeddings,
    "scale_factor": lambda config: config.vision.pixel_shuffle,
    "image_token_id": lambda config: config.image_token_id,
}
_PART = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 64}
_TEXT = {"model_type": "llama", "num_key_value_heads": 1, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}


@pytest.mark.parametrize("left_out", [None, "text_config", *_READ])
def test_fields_that_are_left_out_have_the_defaults_of_transformers(tmp_path, kind, left_out):
    raw = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": kind.lower(),
        "image_token_id": 7,
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "text_config": {**_PART, **_TEXT, "intermediate_size": 16, "max_position_embeddings": 77},
        "vision_config": {**_PART, "image_size": 128, "patch_size": 16, "intermediate_size": 24},
    }
    raw["vision_config"] |= {"hidden_act": "gelu", "layer_norm_eps": 1e-3}
    if left_out:
        part, _, field = left_out.rpartition(".")
        (raw[part] if part else raw).pop(field, None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs, (_, ours) = transformers.AutoConfig.from_pretrained(tmp_path), parse(tmp_path)
    for name, read in _READ.items():
        part, _, field = name.rpartition(".")
        assert read(ours) == getattr(getattr(theirs, part) if part else theirs, field), name


def test_numbers_of_frames_are_written_in_words():
    assert {number: number_in_words(number) for number in WORDS} == WORDS
