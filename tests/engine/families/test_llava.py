"""What is LLaVA-1.5's own; ``test_laws.py`` compares whole answers."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.llava.family import FAMILY
from engine.families.load import load_vision_encoder
from engine.prompt import PreparedMedia
from tests.engine.families.cases import case_named
from tests.engine.families.llava_variants import LlavaVariantReference, make_llava_variant
from tests.engine.families.made import Made
from tests.engine.families.references import make_llava_1_5
from tests.engine.tiny import TRANSFORMERS, make_llava, picture, rewrite_json

CPU = torch.device("cpu")
SIZES = [
    *[(60, 44), (44, 60), (1, 1), (30, 30), (31, 30), (29, 97), (4000, 30), (30, 4000), (641, 480)],
    *[(201, 1), (3, 2000)],
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("llava"))


def parse(path):
    checkpoint = Checkpoint.open(str(path))
    return checkpoint, FAMILY.parse(checkpoint)


def processor(path, **options):
    checkpoint, config = parse(path)
    return FAMILY.media_processor(checkpoint, config, options)


def encoder(path):
    checkpoint, config = parse(path)
    return load_vision_encoder(checkpoint, config, device=CPU, dtype=torch.float32)


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
    "SigLIP, resized and cropped": {
        "tower": "siglip",
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 30, "width": 30},
    },
    "Pixtral, several layers": {"tower": "pixtral", "processor": "Pixtral", "layer": [-1, 0, 1]},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("hub", [False, True])
def test_variants_answer_as_transformers_does(tmp_path, name, hub):
    variant = VARIANTS[name]
    if variant.get("layer") == -1 and variant["tower"] == "siglip" and TRANSFORMERS < (5, 23):
        pytest.skip("earlier versions of Transformers may normalise the last layer's output")
    case = replace(
        case_named("LLaVA-1.5"),
        make=partial(make_llava_variant, **variant),
        reference=LlavaVariantReference,
        mark=lambda index, count: "[IMG]" if variant.get("tower") == "pixtral" else "<image>",
    )
    Made(case, tmp_path / "made", hub).check_all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_prepared_as_transformers_does(path, size):
    image = picture(*size)
    reference = transformers.CLIPImageProcessorPil.from_pretrained(path)
    theirs = reference(image, return_tensors="pt")["pixel_values"]
    media = processor(path).prepare(image)
    assert media.item.num_tokens == processor(path).check(size) == 16
    patches = encoder(path).patchify(torch.from_numpy(media.pixels.copy()))
    expected = torch.nn.functional.unfold(theirs, kernel_size=7, stride=7)[0].T
    torch.testing.assert_close(patches, expected, atol=0, rtol=0)


def test_public_configuration_is_filled_up(tmp_path):
    """The public 7B file leaves nearly all of the language model to its defaults."""
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
    ours = processor(path)
    with pytest.raises(InvalidRequest, match="videos"):
        ours.prepare_video([picture(8, 8)])
    with pytest.raises(ConfigError, match="num_crops"):
        processor(path, num_crops=3)
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, np.zeros((1, 28, 28, 3), np.uint8))])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vision_feature_layer": [-2, -9]}, "vision_feature_layer"),
        ({"vision_feature_layer": [0]}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"vision_feature_layer": -9}, "vision_feature_layer"),
        ({"vision_config": {"model_type": "pixtral"}}, "should be full"),
        ({"vision_config": {"model_type": "dinov2"}}, "dinov2"),
        ({"text_config": {"model_type": "gemma"}}, "gemma"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused_by_field(tmp_path, change, field):
    path = make_llava(tmp_path)
    rewrite_json(path / "config.json", change)
    with pytest.raises(CheckpointError, match=field):
        parse(path)
