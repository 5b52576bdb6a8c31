"""Tests of Mistral3 and LightOnOCR alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import pytest

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.frontend import Frontend
from engine.media.video.video import Video
from engine.text.tokenizer import Tokenizer
from tests.engine.families.cases import case_named
from tests.engine.families.made import Made
from tests.engine.families.opened import check_refused, media_processor, parse
from tests.engine.families.pixtral_squares import SquaresReference, make_lighton_ocr, make_mistral3
from tests.engine.text.tekken_file import write_tekken
from tests.engine.tiny import picture

MAKE = {"Mistral3": make_mistral3, "LightOnOcr": make_lighton_ocr}


@pytest.mark.parametrize("hub", [False, True], ids=["saved", "hub"])
def test_ministral_3(tmp_path, hub):
    """Its decoder alone has all laws."""
    case = replace(case_named("Mistral3"), make=partial(make_mistral3, kind="ministral3"))
    Made(case, tmp_path / "made", hub).check_all()


def write_public_config(folder):
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "image_size": 1540,
            "intermediate_size": 4096,
            "model_type": "pixtral",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1,
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_public_mistral_is_filled_up(tmp_path):
    write_public_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 1540}}'
    )
    _, parsed = parse(tmp_path)
    assert parsed.vision.squares.side == 2 and parsed.vision.squares.norm_eps == 1e-5
    assert parsed.vision.tower.num_layers == 24 and parsed.vision.mlp.bias is False
    # 1540 pixels are 55 squares of 28.
    assert media_processor(tmp_path).check((1540, 1540)) == 55 * 55


@pytest.mark.parametrize("field", ["image", "multimodal"])
def test_a_mistral_with_tekken_json_alone(tmp_path, field):
    """Its tokenizer, chat template and image processor come from that file."""
    write_public_config(tmp_path)
    file = write_tekken(tmp_path, "v11")
    content = json.loads(file.read_text())
    del content["image"]
    content[field] = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
    file.write_text(json.dumps(content))
    assert media_processor(tmp_path).check((3080, 3080)) == 55 * 55
    part = {"type": "image", "image": picture(60, 30)}
    messages = [{"role": "user", "content": [{"type": "text", "text": "where?"}, part]}]
    prompt = Frontend.load(EngineConfig(model=str(tmp_path))).from_messages(messages)
    line = "[IMG]" * 3
    expected = f"<s>[INST]{line}[IMG_BREAK]{line}[IMG_END]where?[/INST]"
    assert Tokenizer.load(tmp_path).decode(prompt.inputs.token_ids) == expected


@pytest.mark.parametrize("kind", MAKE)
def test_2000_sizes_have_the_rows_of_transformers(tmp_path, kind):
    path = MAKE[kind](tmp_path)
    ours, theirs = media_processor(path), SquaresReference.processor_of(path, kind)
    drawn = random.Random(0)
    # Transformers takes an array of 1 or 3 lines for one whose channels come first.
    sizes = [(drawn.randint(4, 400), drawn.randint(4, 400)) for _ in range(2000)]
    counts = theirs._get_num_multimodal_tokens([(height, width) for width, height in sizes])
    checked = 0
    for size, count in zip(sizes, counts["num_image_tokens"], strict=True):
        if count == 0:
            with pytest.raises(InvalidRequest, match=r"too small|too elongated"):
                ours.check(size)
            continue
        lines = ours.grid(size)[1] // 2
        # Mistral3 counts the token at the end of each line, too.
        assert ours.check(size) + (lines if kind == "Mistral3" else 0) == count, size
        checked += 1
    assert checked > 1800


def test_refusals(tmp_path):
    ours = media_processor(make_mistral3(tmp_path))
    with pytest.raises(InvalidRequest, match="not videos"):
        ours.prepare_video(Video.of([picture(8, 8)]))


@pytest.mark.parametrize(
    ("kind", "file", "fields", "param"),
    [
        ("Mistral3", "config.json", {"vision_feature_layer": [1, 2]}, "vision_feature_layer"),
        ("Mistral3", "processor_config.json", {"spatial_merge_size": 1}, "spatial_merge_size"),
        ("LightOnOcr", "processor_config.json", {"image_processor": {"patch_size": 12}}, "patch_size"),
    ],
)
def test_files_that_contradict_each_other_are_refused(tmp_path, kind, file, fields, param):
    check_refused(MAKE[kind](tmp_path), file, fields, param)
