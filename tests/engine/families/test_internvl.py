"""Tests of InternVL alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import random

import pytest
import transformers

from engine import LLM, SamplingParams
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.tiles import best_tiling
from tests.engine.families.case import CasePrompt
from tests.engine.families.internvl import InternVLReference, make_internvl
from tests.engine.families.internvl_chat import make_internvl_chat, with_slow_tokenizer
from tests.engine.families.made import check_answer
from tests.engine.families.opened import check_refused, media_processor, parse
from tests.engine.tiny import picture


def test_a_public_configuration_is_filled_up(tmp_path):
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151667,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "vocab_size": 151674,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "attention_bias": True,
            "hidden_size": 1024,
            "image_size": [448, 448],
            "intermediate_size": 4096,
            "model_type": "internvl_vision",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": [14, 14],
        },
        "vision_feature_layer": -1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 448, "width": 448}}')
    _, parsed = parse(tmp_path)
    assert parsed.decoder.tie_word_embeddings and parsed.vision.rows_per_crop == 256
    assert parsed.vision.tower.layer_scale and not parsed.vision.tower.post_norm
    # 12 tiles and the whole.
    assert media_processor(tmp_path).check((1800, 1350)) == 13 * 256


def test_2000_sizes_have_the_rows_of_transformers(tmp_path):
    path = make_internvl(tmp_path)
    ours, theirs = media_processor(path), InternVLReference.processor_of(path)
    drawn = random.Random(0)
    sizes = [(1, 1), (4000, 30), (30, 4000), (24, 24), (48, 24)]
    sizes += [(drawn.randint(1, 300), drawn.randint(1, 300)) for _ in range(2000)]
    counts = theirs._get_num_multimodal_tokens([(height, width) for width, height in sizes])
    # Transformers counts the tokens around an image, too.
    assert [ours.check(size) + 2 for size in sizes] == counts["num_image_tokens"]


def test_tilings_are_those_of_transformers():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    drawn = random.Random(1)
    for _ in range(3000):
        side, least, most = drawn.choice([24, 448]), drawn.choice([1, 1, 2, 4]), drawn.choice([6, 12, 40])
        # Whole multiples of a side have several tilings of their aspect ratio.
        width, height = (drawn.randint(1, 4) * side // drawn.choice([1, 2, 3]) for _ in range(2))
        expected = get_optimal_tiled_canvas((height, width), (side, side), least, most)
        assert best_tiling((width, height), side, least, most) == expected


@pytest.mark.parametrize(
    "variant",
    [
        {"text": "qwen3", "use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False},
        {"text": "llama", "layer": -2},
        {"use_mean_pooling": False, "hidden_act": "quick_gelu"},
        {"use_absolute_position_embeddings": False},
    ],
    ids=["normalised queries", "an earlier layer", "a norm at the end", "no positions"],
)
def test_other_towers_and_decoders_equal_transformers(tmp_path, variant):
    path = make_internvl(tmp_path, **variant)
    prompt = CasePrompt("what is shown? <IMG_CONTEXT>\nand <IMG_CONTEXT>", (picture(70, 45), picture(20, 20)))
    check_answer(path, prompt, InternVLReference(path).inputs(prompt))


def test_the_number_of_the_first_frame_is_tokenised_with_the_text_before_it(tmp_path):
    path = make_internvl(tmp_path)
    frames = (picture(30, 20, 1), picture(30, 20, 2))
    prompt = CasePrompt("what is shown<video>?", frames=frames)
    (ours,) = LLM(str(path), max_model_len=256).generate(
        prompt.entry, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False
    )
    assert ours.prompt_token_ids == InternVLReference(path).inputs(prompt).ids


def test_tiles_by_request(tmp_path):
    ours = media_processor(make_internvl(tmp_path))
    assert ours.check((96, 48)) == 3 * 4
    assert (
        ours.low_detail().check((96, 48))
        == ours.with_options({"crop_to_patches": False}).check((96, 48))
        == 4
    )
    assert ours.with_options({"max_patches": 2}).check((24, 96)) == 3 * 4
    with pytest.raises(InvalidRequest, match="max_patches"):
        ours.with_options({"max_patches": 7})
    with pytest.raises(ConfigError, match="crop_to_patches"):
        media_processor(tmp_path, crop_to_patches=1)


def test_the_publishers_code_normalises_by_imagenet(tmp_path):
    path = make_internvl_chat(tmp_path)
    (path / "preprocessor_config.json").write_text("{}")
    _, parsed = parse(path)
    assert parsed.vision.normalisation.mean == (0.485, 0.456, 0.406)
    assert parsed.vision.tower.stored_layers == 3 and 2 in parsed.eos_token_ids


@pytest.mark.parametrize(
    "fields",
    [{"ps_version": "v1"}, {"use_thumbnail": False}, {"force_image_size": 48}, {"dynamic_image_size": False}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_the_publishers_names_do_not_cover_is_refused(tmp_path, fields):
    path = make_internvl_chat(tmp_path, **fields)
    with pytest.raises(CheckpointError) as refused:
        media_processor(path)
    assert refused.value.param == next(iter(fields))


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        ("config.json", {"downsample_ratio": 0.4}, "downsample_ratio"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("config.json", {"vision_feature_layer": [1, 2]}, "vision_feature_layer"),
        ("config.json", {"vision_config": {"image_size": [24, 12]}}, "image_size"),
        ("config.json", {"vision_config": {"norm_type": "batch"}}, "norm_type"),
        ("preprocessor_config.json", {"size": {"height": 30, "width": 30}}, "size"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
    ],
)
def test_files_that_cannot_be_followed_are_refused(tmp_path, file, fields, param):
    check_refused(make_internvl(tmp_path), file, fields, param)


def test_the_publishers_files_of_a_slow_tokenizer(tmp_path):
    """A vocabulary, its merges, and the tokens that were added: there is no tokenizer.json."""
    path = make_internvl_chat(tmp_path)
    with_slow_tokenizer(path)
    llm = LLM(str(path), device="cpu", dtype="float32", max_model_len=256, kv_cache_bytes=16 << 20)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    prompt = "<|im_start|>user\n<image>hello world 12<|im_end|>\n"
    entry = {"prompt": prompt, "multi_modal_data": {"image": [picture(24, 24)]}}
    (output,) = llm.generate([entry], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    _, config = parse(path)
    rows = config.vision.rows_per_crop
    shown = prompt.replace("<image>", f"<img>{'<IMG_CONTEXT>' * rows}</img>")
    assert output.prompt_token_ids == theirs(shown).input_ids
    assert theirs.convert_tokens_to_ids("<|im_end|>") in config.eos_token_ids
