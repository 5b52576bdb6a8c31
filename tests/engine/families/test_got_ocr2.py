"""Tests of GOT-OCR 2 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.inputs.messages import parse_messages
from engine.model_parts import load_prompt_builder
from engine.prompt import PreparedMedia
from tests.engine.families.case import CasePrompt
from tests.engine.families.got_ocr2 import FRAME, IMAGE, ROWS, SIDE, GotReference, make_got_ocr2
from tests.engine.families.made import check_answer
from tests.engine.families.opened import check_refused, encoder, media_processor, parse
from tests.engine.tiny import picture


def test_a_configuration_of_public_sizes_is_filled_up(tmp_path):
    config = {
        "architectures": ["GotOcr2ForConditionalGeneration"],
        "model_type": "got_ocr2",
        "image_seq_length": 576,
        "image_token_index": 151859,
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "max_position_embeddings": 32768,
            "model_type": "qwen2",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rope_theta": 1000000.0,
            "vocab_size": 151860,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": ""},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, model = parse(tmp_path)
    tower = model.vision.tower
    assert (tower.hidden_size, tower.intermediate_size, tower.num_layers, tower.num_heads) == (
        768,
        3072,
        12,
        12,
    )
    assert tower.full_layers == (2, 5, 8, 11) and tower.window == 14
    assert (tower.neck, tower.reduced) == (256, (512, 1024))
    assert (model.vision.image_size, model.vision.rows_per_crop) == (1024, 256)
    assert model.decoder.tie_word_embeddings and 151645 in model.eos_token_ids


@pytest.mark.parametrize(
    "tower",
    [
        {"use_abs_pos": False, "qkv_bias": False},
        {"use_rel_pos": False, "window_size": 7},
        {"image_size": 36, "global_attn_indexes": [], "hidden_act": "gelu_pytorch_tanh"},
    ],
    ids=["no table, no biases", "no distances", "no whole images"],
)
def test_other_towers_equal_transformers(tmp_path, tower):
    path = make_got_ocr2(tmp_path, **tower)
    prompt = CasePrompt(FRAME.format(f"{IMAGE}and {IMAGE} OCR: "), (picture(70, 45), picture(20, 20)))
    rows = media_processor(path).check((1, 1))
    check_answer(path, prompt, GotReference(path, num_image_tokens=rows).inputs(prompt))


def test_the_image_processors_file_states_no_tiles(tmp_path):
    """As in Transformers, whose whole processor has options of its own."""
    make_got_ocr2(tmp_path, hub=True)
    file = tmp_path / "preprocessor_config.json"
    stated = json.loads(file.read_text()) | {"crop_to_patches": True, "max_patches": 2}
    file.write_text(json.dumps(stated))
    theirs = GotReference(tmp_path)
    size = 3 * SIDE, SIDE
    prompt = CasePrompt("<imgpad>", (picture(*size),))
    for options in ({}, {"crop_to_patches": True}):
        theirs.options |= options
        ids = theirs.inputs(prompt).ids
        assert len(ids) == media_processor(tmp_path, **options).check(size)


@pytest.mark.parametrize("pages", [1, 2])
def test_a_chat_is_the_prompt_of_transformers(tmp_path, pages):
    path = make_got_ocr2(tmp_path)
    shown, theirs = [picture(40, 30, seed) for seed in range(pages)], GotReference(path).processor
    several = {"multi_page": True} if pages > 1 else {}
    expected = theirs(shown, num_image_tokens=ROWS, **several)["input_ids"][0]
    text = " OCR across multi pages: " if several else " OCR: "
    content = [{"type": "text", "text": text}, *({"type": "image", "image": each} for each in shown)]
    parsed, sources = parse_messages([{"role": "user", "content": content}])
    ours = media_processor(path)
    items = [ours.prepare(source.image).item for source in sources]
    builder = load_prompt_builder(EngineConfig(model=str(path)))
    assert builder.from_messages(parsed, items).token_ids == expected


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        ("config.json", {"vision_config": {"num_channels": 1}}, "num_channels"),
        ("config.json", {"vision_config": {"num_attention_heads": 5}}, "num_attention_heads"),
        ("config.json", {"vision_config": {"window_size": 0}}, "window_size"),
        ("config.json", {"vision_config": {"global_attn_indexes": "all"}}, "global_attn_indexes"),
        ("config.json", {"vision_config": {"hidden_act": "mish"}}, "hidden_act"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, file, fields, param):
    make_got_ocr2(tmp_path, hub=True)
    check_refused(tmp_path, file, fields, param)


def test_pixels_that_contradict_their_grid_are_refused(tmp_path):
    path = make_got_ocr2(tmp_path)
    prepared, vision = media_processor(path).prepare(picture(60, 25)), encoder(path)
    (rows,) = vision.encode([prepared])
    assert rows.shape == (prepared.item.num_tokens, 64)
    smaller = PreparedMedia(prepared.item, np.ascontiguousarray(prepared.pixels[:, 1:]))
    with pytest.raises(InvalidRequest, match="do not fit grid"):
        vision.encode([smaller])
