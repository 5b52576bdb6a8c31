"""Towers in fp8 give what Transformers' towers give with matrices, and inputs, that are rounded alike."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from engine.config import EngineConfig
from engine.distributed.group import SingleProcessGroup
from engine.encoder import EncoderEngine
from engine.errors import ConfigError
from engine.families.minicpm_v4_6.encoder import WindowMerger
from engine.fit import check_fit
from engine.kernels import dispatch
from engine.kernels.fp8 import FP8
from engine.layers.build import BuildContext
from engine.layers.matrix_formats import Fp8Format
from engine.vision.transformer import VisionTransformer
from engine.vision.transformer_config import VisionConfig
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.families.qwen import IMAGE, make_qwen2_5_vl
from tests.engine.tiny import make_qwen2_vl, make_text, picture, reference_inputs

#: Layer norms and an MLP; RMS norms and a gated MLP, of a size that has to be padded.
MAKERS = {"Qwen2-VL": make_qwen2_vl, "Qwen2.5-VL": partial(make_qwen2_5_vl, inner=44)}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The numbers that rows in fp8 stand for, each with a scale by its largest magnitude."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 448
    return (x / scale).to(FP8).float() * scale


def expected(path: Path, pictures: list, *, weights: bool, inputs: bool) -> list[torch.Tensor]:
    """Rows by Transformers, with the matrices of the tower's blocks, and their inputs, rounded or not."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    for block in model.model.visual.blocks:
        for layer in (module for module in block.modules() if isinstance(module, nn.Linear)):
            if weights:
                layer.weight.data = rounded(layer.weight.data)
            if inputs:
                layer.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:]))
    given = reference_inputs(path, IMAGE * len(pictures), pictures)
    with torch.inference_mode():
        return model.model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    found, wanted = torch.cat(list(found)), torch.cat(list(wanted))
    return float((found - wanted).norm() / wanted.norm())


def on_tensor_cores(monkeypatch) -> None:
    """Take the path of Hopper GPUs, in float32, with a product of rounded rows that is exact."""

    def product(rows, weight, scale, bias, dtype):
        return nn.functional.linear(rows.numbers.float() * rows.scale, weight.float() * scale.values, bias)

    monkeypatch.setattr(dispatch, "supports_scaled", lambda x, weight, scale: scale.round_inputs)
    monkeypatch.setattr(dispatch, "scaled_gemm", product)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("family", MAKERS)
def test_rows_are_those_of_rounded_matrices(tmp_path, monkeypatch, family, inputs):
    path = MAKERS[family](tmp_path / "model")
    pictures = [picture(60, 44), picture(33, 90, 1)]
    if inputs:
        on_tensor_cores(monkeypatch)
    engine = EncoderEngine.load(EngineConfig(model=str(path), device="cpu", encoder_quantization="fp8"))
    prepared = [media_processor(path).prepare(image) for image in pictures]
    rows = engine.encode(prepared)
    # A number between two of fp8 may be rounded up here and down there.
    assert error(rows, expected(path, pictures, weights=True, inputs=inputs)) < (0.01 if inputs else 1e-5)
    # Rounding the matrices alone, or nothing, gives other rows.
    assert error(rows, expected(path, pictures, weights=inputs, inputs=False)) > 0.03
    assert error(encoder(path).encode(prepared), expected(path, pictures, weights=False, inputs=False)) < 1e-5


def test_what_stands_between_the_blocks_is_not_rounded():
    config = VisionConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, patch_dim=12)
    build = BuildContext(
        torch.device("cpu"), torch.float32, SingleProcessGroup(), tower=Fp8Format(None, "output")
    )
    assert FP8 in {each.dtype for each in VisionTransformer(config, build).parameters()}
    assert {each.dtype for each in WindowMerger(config, build).parameters()} == {torch.float32}


def test_models_that_have_no_such_tower_are_refused(tmp_path):
    config = EngineConfig(model="any", encoder_quantization="fp8")
    model = parse(make_qwen2_vl(tmp_path / "model"))[1]
    check_fit(config, model)
    tower = replace(model.vision.tower, intermediate_size=3420)
    odd = replace(model, vision=replace(model.vision, tower=tower))
    gated = replace(tower, gated_mlp=True)
    check_fit(config, replace(model, vision=replace(model.vision, tower=gated)))
    text = parse(make_text(tmp_path / "text", "llama"))[1]
    for refused, words in ((odd, "intermediate size is 3420"), (text, "has no vision tower")):
        check_fit(EngineConfig(model="any"), refused)
        with pytest.raises(ConfigError, match=words) as caught:
            check_fit(config, refused)
        assert caught.value.param == "encoder_quantization"
