"""Tests of LLaVA-NeXT alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import transformers

from engine.errors import InvalidRequest
from engine.media.video.video import Video
from engine.prompt import PreparedMedia
from tests.engine.families.case import CasePrompt
from tests.engine.families.cases import case_named
from tests.engine.families.llava_next import LlavaNextReference, make_llava_next
from tests.engine.families.made import Made, check_answer
from tests.engine.families.opened import check_refused, encoder, media_processor, parse
from tests.engine.tiny import picture

#: As llava-v1.6-mistral-7b states it.
PUBLIC = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


@pytest.fixture
def public(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC))
    return tmp_path


def test_public_configuration_is_filled_up(public):
    _, parsed = parse(public)
    assert parsed.decoder.windows is None or not any(parsed.decoder.windows)
    assert parsed.vision.crops.tower.num_layers == 23 and parsed.vision.crops.rows_per_crop == 576
    assert parsed.vision.pinpoints[-1] == (336, 1008) and parsed.vision.max_tiles is None


def test_2000_sizes_have_the_rows_of_transformers(public):
    ours = media_processor(public)
    theirs = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 336}, image_grid_pinpoints=PUBLIC["image_grid_pinpoints"]
        ),
        transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer()),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    drawn = random.Random(0)
    sizes = [(1, 1), (4000, 30), (30, 4000), (336, 336), (337, 336), (1008, 336)]
    sizes += [(drawn.randint(1, 3000), drawn.randint(1, 3000)) for _ in range(2000)]
    counts = theirs._get_num_multimodal_tokens([(height, width) for width, height in sizes])
    assert [ours.check(size) for size in sizes] == counts["num_image_tokens"]


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<image>": 0, "<unk>": 1}, unk_token="<unk>"))


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_siglip_and_other_decoders_equal_transformers(tmp_path, text):
    path = make_llava_next(tmp_path, tower="siglip", text=text)
    prompt = CasePrompt("USER: <image>\nwhat is shown? ASSISTANT:", (picture(70, 45),))
    check_answer(path, prompt, LlavaNextReference(path).inputs(prompt))


def test_a_granite_multiplies_rows_of_images_too(tmp_path):
    """As Granite Vision 3 has it: SigLIP, and a decoder whose input is multiplied as a whole."""
    factors = {"embedding_multiplier": 3.0, "logits_scaling": 2.5}
    factors |= {"residual_multiplier": 0.4, "attention_multiplier": 0.5}
    make = partial(make_llava_next, tower="siglip", text="granite", **factors)
    Made(replace(case_named("LLaVA-NeXT"), make=make), tmp_path / "made").check_all()


def test_refusals(tmp_path):
    path = make_llava_next(tmp_path)
    ours = media_processor(path)
    with pytest.raises(InvalidRequest, match="not videos"):
        ours.prepare_video(Video.of([picture(8, 8)]))
    media = ours.prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels[:-1])])


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        ("config.json", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("config.json", {"image_grid_pinpoints": [[30, 45]]}, "image_grid_pinpoints"),
        ("config.json", {"vision_config": {"model_type": "pixtral"}}, "vision_feature_select_strategy"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 60}}, "size"),
        ("preprocessor_config.json", {"crop_size": {"height": 30, "width": 20}}, "crop_size"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[30, 60]]}, "image_grid_pinpoints"),
    ],
)
def test_files_that_cannot_be_followed_are_refused(tmp_path, file, fields, param):
    check_refused(make_llava_next(tmp_path), file, fields, param)


def test_biases_of_a_tower_are_not_those_of_a_mistral_that_states_some(tmp_path):
    path = make_llava_next(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= {"attention_bias": True, "mlp_bias": True}
    (path / "config.json").write_text(json.dumps(config))
    checkpoint, parsed = parse(path)
    assert any(name.endswith("self_attn.q_proj.bias") for name in checkpoint.tensor_names)
    assert not (parsed.decoder.qkv_bias or parsed.decoder.o_bias or parsed.decoder.mlp_bias)
