"""Tests of Aya Vision and Command A Vision alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import random

import pytest

from engine import LLM
from engine.errors import CheckpointError
from engine.families.aya_vision.processor import enlarging_tiling
from tests.engine.families.aya_vision import SIDE, AyaVisionReference, make_aya_vision
from tests.engine.families.case import CasePrompt
from tests.engine.families.made import check_answer
from tests.engine.families.opened import check_refused, media_processor, parse
from tests.engine.families.without_torchvision import imported
from tests.engine.tiny import picture

AYA, COMMAND = "AyaVision", "Cohere2Vision"


@pytest.mark.parametrize(
    ("kind", "image", "patch", "fields", "rows", "inner"),
    [
        (AYA, 364, 14, {"alignment_intermediate_size": 28672}, 169, 14336),
        (COMMAND, 512, 16, {}, 256, 18432),
    ],
)
def test_a_configuration_of_public_sizes_is_filled_up(tmp_path, kind, image, patch, fields, rows, inner):
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": image}
    config = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "text_config": {
            "model_type": "cohere2",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "logit_scale": 0.25,
            "rope_theta": 50000,
            "sliding_window_pattern": 4,
        },
        "vision_config": {**tower, "num_attention_heads": 16, "patch_size": patch},
        **fields,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, model = parse(tmp_path)
    decoder = model.decoder
    assert model.image_token_id == 255036 and model.vision.rows_per_crop == rows
    assert model.vision.gated.intermediate_size == inner
    # Aya Vision takes the last block's output as it is.
    assert model.vision.tower.post_norm == (kind == COMMAND)
    assert decoder.parallel and decoder.tie_word_embeddings and decoder.logits_multiplier == 0.25
    assert decoder.rope.adjacent and decoder.rope.theta == 50000 and decoder.local_rope.turning == 0
    assert decoder.local_layers == tuple(range(3, 32, 4))
    assert decoder.windows[:5] == (4096, 4096, 4096, None, 4096)


def test_2000_sizes_have_the_tilings_of_transformers():
    (theirs,), drawn = imported("cohere2_vision.image_processing_cohere2_vision"), random.Random(0)
    sizes = [(1, 1), (4000, 30), (30, 4000), (512, 512), (513, 512), (1024, 512), (2048, 1536)]
    sizes += [(drawn.randint(1, 3000), drawn.randint(1, 3000)) for _ in range(2000)]
    for size in sizes:
        side, most = drawn.choice([24, 512]), drawn.choice([2, 9, 12])
        expected = theirs.get_optimal_tiled_canvas(size[::-1], (side, side), 1, most)
        assert enlarging_tiling(size, side, most) == expected, size


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        (AYA, {"text": "cohere", "vision_feature_layer": [1], "adapter_layer_norm_eps": 1e-2}),
        (COMMAND, {"downsample_factor": 4, "processor": {"crop_to_patches": False, "patch_size": 1}}),
    ],
    ids=["another layer of the tower, Cohere 1", "one row, whole images"],
)
def test_other_towers_and_decoders_equal_transformers(tmp_path, kind, variant):
    path = make_aya_vision(tmp_path, kind=kind, **variant)
    reference = AyaVisionReference(path, kind)
    image = "<image>" if kind == AYA else "<|IMG_PATCH|>"
    prompt = CasePrompt(f"what is shown? {image}\nand {image}", (picture(70, 45), picture(20, 20)))
    check_answer(path, prompt, reference.inputs(prompt))


def test_tiles_by_request(tmp_path):
    ours = media_processor(make_aya_vision(tmp_path, kind=COMMAND))
    assert ours.check((2 * SIDE, SIDE)) == 3 * 4
    whole = ours.with_options({"crop_to_patches": False})
    assert ours.low_detail().check((2 * SIDE, SIDE)) == whole.check((2 * SIDE, SIDE)) == 4
    assert ours.with_options({"max_patches": 2}).check((SIDE, 4 * SIDE)) == 3 * 4


@pytest.mark.parametrize(
    ("kind", "file", "fields", "param"),
    [
        (AYA, "config.json", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        (AYA, "config.json", {"vision_feature_layer": [-2, 1]}, "vision_feature_layer"),
        (AYA, "config.json", {"downsample_factor": 3}, "downsample_factor"),
        (AYA, "config.json", {"alignment_intermediate_size": 41}, "alignment_intermediate_size"),
        (COMMAND, "config.json", {"vision_config": {"model_type": "clip_vision_model"}}, "vision_config"),
        (COMMAND, "preprocessor_config.json", {"do_resize": False}, "do_resize"),
        (COMMAND, "preprocessor_config.json", {"size": {"height": 30, "width": 30}}, "size"),
    ],
)
def test_files_that_are_not_supported_are_refused_by_name(tmp_path, kind, file, fields, param):
    make_aya_vision(tmp_path, kind=kind)
    check_refused(tmp_path, file, fields, param)


def test_a_tokenizer_without_the_token_of_rows_is_refused(tmp_path):
    make_aya_vision(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({"img_patch_token": "<|PATCH|>"}))
    with pytest.raises(CheckpointError, match=r"no token <\|PATCH\|>"):
        LLM(str(tmp_path), max_model_len=256).generate(
            CasePrompt("<image>", (picture(20, 20),)).entry, use_tqdm=False
        )
