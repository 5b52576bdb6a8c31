"""Checkpoints in floats of 4 bits compute what Transformers computes with their dequantised weights."""

from __future__ import annotations

import pytest
import torch

from engine.checkpoint.quantisation import parse_quantisation
from engine.errors import CheckpointError, ConfigError
from engine.kernels.int4 import dequantise_int4
from tests.engine.fp4_files import LAYOUTS, config, quantise
from tests.engine.tiny import make_text, rewrite_json, rewrite_tensors
from tests.engine.weights.checkpoints import (
    Rank,
    check_inputs_are_split,
    check_outputs_are_split,
    load,
    logits,
    reference,
    refusal,
)
from tests.engine.weights.test_int4 import EXPERT_MATRIX


def matrix(layer):
    return dequantise_int4(layer.weight, layer.scale, torch.float32)


@pytest.mark.parametrize("kind", ["llama3", "phi3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_dequantised_weights(tmp_path, layout, kind):
    """Projections of one layer have factors of their own, or one that they share."""
    path = make_text(tmp_path / "model", kind)
    exact = quantise(path, layout)
    decoder = load(path)
    attention, mlp = decoder.layers[1].self_attn, decoder.layers[1].mlp
    assert attention.qkv_proj.weight.dtype == mlp.gate_up_proj.weight.dtype == torch.int16
    wanted = exact["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(matrix(mlp.down_proj), wanted, rtol=3e-7, atol=0)
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_have_their_shares(tmp_path, layout):
    path = make_text(tmp_path / "model", "llama", intermediate_size=128)
    quantise(path, layout)
    whole, ranks = load(path), [load(path, Rank(rank, 2)) for rank in range(2)]
    check_outputs_are_split(whole, ranks, matrix)
    check_inputs_are_split(whole, ranks, matrix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dummy_weights_have_the_format_that_is_stated(tmp_path, layout):
    path = make_text(tmp_path / "model", "llama")
    rewrite_json(path / "config.json", {"quantization_config": config(layout, [])})
    (path / "model.safetensors").unlink()
    decoder = load(path, load_format="dummy")
    layers = [layer for layer in decoder.modules() if hasattr(layer, "packed")]
    assert len(layers) == 8 and {layer.weight.dtype for layer in layers} == {torch.int16}
    assert matrix(layers[0]).unique().numel() == 15 and logits(decoder).isfinite().all()


def test_ranks_that_would_cut_groups_are_refused(tmp_path):
    path = make_text(tmp_path / "model", "llama", intermediate_size=96)
    quantise(path, "mxfp4-pack-quantized")
    with pytest.raises(
        ConfigError, match=r"cuts a group of 32 inputs of the mxfp4 weights of layers\.0\.mlp\.down"
    ):
        load(path, Rank(0, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts(tmp_path, layout):
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    path = make_text(tmp_path / "model", "qwen2_moe", **sizes)
    exact = quantise(path, layout, matrix=EXPERT_MATRIX)
    decoder = load(path)
    experts = decoder.layers[0].mlp.experts
    assert experts.gate_up_proj.weight.dtype == experts.down_proj.weight.dtype == torch.int16
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.0.mlp.down_proj.weight_scale"),
            "in 4 bits and has no weight_scale",
        ),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_global_scale"), "has no weight_global_scale"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(96, 4)}),
            "has dtype F32; scales of nvfp4-pack-quantized should be F8_E4M3",
        ),
        (lambda t: t.update({"lm_head.weight_packed": torch.ones(4, 4, dtype=torch.uint8)}), "lm_head"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.uint8)}), "has dtype U8; only"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, change, message):
    path = make_text(tmp_path / "model", "llama")
    quantise(path, "nvfp4-pack-quantized")

    def changed(tensors):
        change(tensors)
        return tensors

    rewrite_tensors(path, changed)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def changed(layout: str, **weights):
    raw = config(layout)
    raw["config_groups"]["group_0"]["weights"] |= weights
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**config("modelopt"), "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
        ({**config("modelopt"), "group_size": 32}, "group_size 32 of NVFP4"),
        ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'"),
        (changed("mxfp4-pack-quantized", group_size=16), "group_size 16 of mxfp4-pack-quantized"),
        ({**config("nvfp4-pack-quantized"), "sparsity_config": {"format": "sparse"}}, "sparsity_config"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path, raw, message):
    refused = refusal(make_text(tmp_path / "model", "llama"), raw)
    assert message in refused and "nvfp4-pack-quantized" in refused


def test_another_format_of_floats_is_refused():
    raw = changed("nvfp4-pack-quantized")
    raw["config_groups"]["group_0"]["format"] = "float-quantized"
    stated = r"config_groups\.group_0: weights of type float, 4 bits, in format 'float-quantized'"
    with pytest.raises(CheckpointError, match=stated):
        parse_quantisation(raw)
