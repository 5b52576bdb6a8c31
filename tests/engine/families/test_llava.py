"""Tests of LLaVA-1.5 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engine.errors import ConfigError, InvalidRequest
from engine.media.video.video import Video
from engine.prompt import PreparedMedia
from tests.engine.families.cases import case_named
from tests.engine.families.llava_variants import LlavaVariantReference, make_llava_variant
from tests.engine.families.made import Made
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.families.references import make_llava_1_5
from tests.engine.tiny import make_llava, picture


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("hub", [False, True])
def test_the_class_token_may_be_a_row_and_the_decoder_mistral(tmp_path, hub):
    make = partial(make_llava_1_5, strategy="full", text="mistral")
    Made(replace(case_named("LLaVA-1.5"), make=make), tmp_path / "made", hub).check_all()


VARIANTS = {
    "SigLIP": {"tower": "siglip", "processor": "Siglip"},
    "SigLIP without its first patch": {"tower": "siglip", "processor": "Siglip", "strategy": "default"},
    "SigLIP's last layer, Qwen2": {"tower": "siglip", "processor": "Siglip", "layer": -1, "text": "qwen2"},
    "several layers": {"layer": [-2, 1, -1], "strategy": "default"},
    "several layers, among them the embeddings": {"layer": [-3, 0], "strategy": "full"},
    "padded to a square": {"processor": "Llava", "strategy": "default"},
    "Phi3": {"text": "phi3"},
    "Qwen3, without the class token": {"text": "qwen3", "strategy": "default"},
    "SigLIP, resized and cropped": {
        "tower": "siglip",
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 30, "width": 30},
    },
    "Pixtral, several layers": {"tower": "pixtral", "processor": "Pixtral", "layer": [-1, 0, 1]},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("hub", [False, True])
def test_variants_answer_as_transformers_does(tmp_path, name, hub):
    variant = VARIANTS[name]
    case = replace(
        case_named("LLaVA-1.5"),
        make=partial(make_llava_variant, **variant),
        reference=LlavaVariantReference,
        placeholder=lambda index, count: "[IMG]" if variant.get("tower") == "pixtral" else "<image>",
    )
    Made(case, tmp_path / "made", hub).check_all()


def test_public_configuration_is_filled_up(tmp_path):
    """The public 7B file leaves nearly all of the decoder's fields to their defaults."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, parsed = parse(tmp_path)
    decoder = parsed.decoder
    assert (decoder.hidden_size, decoder.intermediate_size, decoder.num_layers) == (4096, 11008, 32)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim, decoder.max_position) == (
        32,
        32,
        128,
        4096,
    )
    assert parsed.vision.tower.num_layers == 23 and parsed.vision.rows_per_crop == 576
    assert parsed.dtype == "float16" and parsed.eos_token_ids == (2,)


def test_refusals(path, tmp_path):
    ours = media_processor(path)
    with pytest.raises(InvalidRequest, match="videos"):
        ours.prepare_video(Video.of([picture(8, 8)]))
    with pytest.raises(ConfigError, match="num_crops"):
        media_processor(path, num_crops=3)
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, np.zeros((1, 28, 28, 3), np.uint8))])
