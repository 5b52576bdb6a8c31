"""Checkpoints in fp8 compute what Transformers computes with their dequantised weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, ConfigError
from engine.families.load import check_tensors, load_vision_encoder
from engine.families.registry import resolve
from engine.kernels.fp8 import FP8, dequantise
from tests.engine.fp8_files import Scheme, quantise
from tests.engine.quantised_files import MATRIX
from tests.engine.tiny import make_qwen2_vl, make_text, rewrite_json, rewrite_tensors
from tests.engine.weights.checkpoints import (
    CPU,
    IDS,
    Rank,
    answers,
    check_inputs_are_split,
    check_outputs_are_split,
    load,
    logits,
    reference,
    refusal,
)

SCHEMES = {
    "native, blocks": Scheme(True, "block"),
    "native, per tensor": Scheme(True, "tensor"),
    "native, per tensor, static inputs": Scheme(True, "tensor", static=True),
    "compressed, per tensor, static inputs": Scheme(False, "tensor", static=True),
    "compressed, per channel": Scheme(False, "channel"),
    "compressed, blocks": Scheme(False, "block"),
    "compressed, large blocks": Scheme(False, "block", block=(128, 128)),
}
TEXT_MATRIX = r"(?!.*visual)" + MATRIX
#: Kinds of layers: apart, with biases, with heads of another width, fused.
KINDS = ["llama", "llama3", "qwen3", "phi3"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_logits_are_those_of_the_dequantised_weights(tmp_path, scheme, kind):
    path = make_text(tmp_path / "model", kind)
    exact = quantise(path, scheme)
    decoder = load(path)
    down = decoder.layers[1].mlp.down_proj
    assert down.weight.dtype == FP8
    torch.testing.assert_close(
        dequantise(down.weight, down.scale, torch.float32), exact["model.layers.1.mlp.down_proj.weight"]
    )
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("beside", [False, True], ids=["in config.json", "in hf_quant_config.json"])
def test_files_of_model_optimizer(tmp_path, beside):
    """Its scales have the names of compressed-tensors, without an axis, as those of keys and values."""
    path = make_text(tmp_path / "model", "llama")
    exact = quantise(path, Scheme(False, "tensor", static=True))
    rewrite_tensors(
        path,
        lambda tensors: {
            name.replace("self_attn.k_scale", "self_attn.k_proj.k_scale"): tensor.reshape(())
            if name.endswith("_scale")
            else tensor
            for name, tensor in tensors.items()
        },
    )
    algorithms = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    stated = {**algorithms, "quant_method": "modelopt", "ignore": ["lm_head"]}
    rewrite_json(path / "config.json", {"quantization_config": None if beside else stated})
    if beside:
        exported = {"producer": {"name": "modelopt"}, "quantization": {**algorithms, "exclude_modules": []}}
        (path / "hf_quant_config.json").write_text(json.dumps(exported))
    decoder = load(path)
    assert decoder.layers[1].mlp.down_proj.weight.dtype == FP8
    rewrite_json(path / "config.json", {"quantization_config": None})
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    "scheme",
    # Where the last block is cut, Transformers 5.23 refuses a matrix or reads it wrongly.
    [Scheme(True, "block", block=(32, 32)), Scheme(True, "tensor", static=True)],
)
def test_logits_are_those_of_transformers_reading_the_same_files(tmp_path, scheme):
    pytest.importorskip("accelerate", reason="Transformers needs it to read fp8")
    path = make_text(tmp_path / "model", "qwen3")
    quantise(path, scheme)
    config = transformers.FineGrainedFP8Config(
        weight_block_size=scheme.block if scheme.shared == "block" else None,
        activation_scheme="static" if scheme.static else "dynamic",
        dequantize=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32
    )
    torch.testing.assert_close(logits(load(path)), model(IDS[None]).logits[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scheme", [Scheme(True, "block"), Scheme(False, "channel")])
def test_layers_that_are_not_converted_keep_their_dtype(tmp_path, scheme):
    path = make_text(tmp_path / "model", "llama")
    exact = quantise(path, scheme, ignored=r"layers\.0\.|down_proj")
    decoder = load(path)
    kinds = [
        (layer.self_attn.qkv_proj.weight.dtype == FP8, layer.mlp.down_proj.weight.dtype == FP8)
        for layer in decoder.layers
    ]
    assert kinds == [(False, False), (True, False)]
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_ranks_have_their_shares(tmp_path, scheme, kind):
    scheme = replace(scheme, block=(24, 16))
    path = make_text(tmp_path / "model", kind)
    quantise(path, scheme)
    whole, ranks = load(path), [load(path, Rank(rank, 2)) for rank in range(2)]

    def matrix(layer):
        return dequantise(layer.weight, layer.scale, torch.float32)

    check_outputs_are_split(whole, ranks, matrix)
    check_inputs_are_split(whole, ranks, matrix)


def test_ranks_that_would_cut_a_block_are_refused(tmp_path):
    path = make_text(tmp_path / "model", "llama")
    quantise(path, Scheme(True, "block", block=(32, 64)))
    with pytest.raises(ConfigError, match="cuts a block of 64 inputs") as caught:
        load(path, Rank(0, 2))
    assert caught.value.param == "tensor_parallel_size"


def test_the_tower_is_left_alone(tmp_path):
    path = make_qwen2_vl(tmp_path / "model")
    exact = quantise(path, Scheme(True, "block"), matrix=TEXT_MATRIX)
    checkpoint = Checkpoint.open(str(path))
    config = resolve(checkpoint).parse(checkpoint)
    check_tensors(checkpoint, config)
    tower = load_vision_encoder(checkpoint, config, device=CPU, dtype=torch.float32)
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    assert load(path).layers[0].self_attn.o_proj.weight.dtype == FP8
    assert any("visual" in name for name in exact)


def test_matrices_are_rounded_as_they_are_loaded(tmp_path):
    path = make_text(tmp_path / "model", "qwen2")
    plain, rounded = load(path), load(path, quantization="fp8")
    for layer, other in zip(plain.layers, rounded.layers, strict=True):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            weight, ours = layer.get_submodule(name).weight, other.get_submodule(name)
            assert ours.weight.dtype == FP8
            error = (dequantise(ours.weight, ours.scale, torch.float32) - weight).abs()
            # Four bits of mantissa, or a step of the smallest numbers at this row's scale.
            assert (
                error <= torch.maximum(weight.abs() * 2.0**-4, ours.scale.values * 2.0**-10) * 1.001
            ).all()
            assert error.amax() > 0
    expected, found = logits(plain), logits(rounded)
    assert 0 < (found - expected).norm() / expected.norm() < 0.15
    assert plain.embed_tokens.weight.dtype == rounded.lm_head.weight.dtype == torch.float32


def test_dummy_weights_may_be_rounded_too(tmp_path):
    path = make_text(tmp_path / "model", "llama")
    decoder = load(path, quantization="fp8", load_format="dummy")
    up = decoder.layers[0].mlp.gate_up_proj
    assert up.weight.dtype == FP8 and 0.01 < dequantise(up.weight, up.scale, torch.float32).std() < 0.03
    assert logits(decoder).isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dummy_weights_have_the_format_that_is_stated(tmp_path, scheme, kind):
    path = make_text(tmp_path / "model", kind)
    rewrite_json(path / "config.json", {"quantization_config": scheme.config([])})
    (path / "model.safetensors").unlink()
    decoder = load(path, load_format="dummy")
    layers = [layer for layer in decoder.modules() if hasattr(layer, "packed")]
    assert len(layers) >= 8 and {layer.weight.dtype for layer in layers} == {FP8}
    query = layers[0]
    assert 0.01 < dequantise(query.weight, query.scale, torch.float32).std() < 0.03
    assert logits(decoder).isfinite().all()


def test_answers_about_an_image_are_those_of_the_dequantised_checkpoint(tmp_path):
    path = make_qwen2_vl(tmp_path / "model")
    exact = quantise(path, Scheme(True, "block"), matrix=TEXT_MATRIX)
    quantised, plain = (output.outputs[0] for output in answers(path, exact))
    assert quantised.token_ids == plain.token_ids and quantised.logprobs == plain.logprobs


def drop(suffix):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(suffix)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("layers.1.mlp.down_proj.weight_scale"),
            r"layers\.1\.mlp\.down_proj\.weight is in fp8 and has no",
        ),
        (
            lambda t: (
                t | {"lm_head.weight": t["lm_head.weight"].to(FP8), "lm_head.weight_scale": torch.ones(1)}
            ),
            r"no matrix of a decoder layer are not supported: lm_head\.weight",
        ),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(3, 1)},
            r"q_proj\.weight_scale.* has shape \[3, 1\]",
        ),
        (
            lambda t: (
                t
                | {"model.layers.0.self_attn.k_proj.weight": torch.ones(32, 64)}
                | {"model.layers.0.self_attn.k_proj.weight_scale": torch.ones(1)}
            ),
            r"quantised alike: layers\.0\.self_attn\.q_proj fp8 output, layers\.0\.self_attn\.k_proj not",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, change, message):
    path = make_text(tmp_path / "model", "llama")
    quantise(path, Scheme(False, "channel"))
    rewrite_tensors(path, change)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_fp8_without_a_configuration_is_refused(tmp_path):
    path = make_text(tmp_path / "model", "llama")
    quantise(path, Scheme(False, "channel"))
    rewrite_json(path / "config.json", {"quantization_config": None})
    with pytest.raises(CheckpointError, match=r"in fp8, but config\.json has no quantization_config"):
        load(path)


def weights(**change):
    base = Scheme(False, "channel").config([])
    base["config_groups"]["group_0"]["weights"] |= change
    return base


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        ({"quant_method": "fp8", "activation_scheme": "odd"}, "activation_scheme 'odd'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 100]}, "blocks of [128, 100]"),
        ({"quant_method": "fp8", "weight_block_size": "wide"}, "blocks of 'wide'"),
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
        (weights(type="int"), "weights of type int, 8 bits"),
        (weights(num_bits=4), "weights of type float, 4 bits"),
        (weights(strategy="group"), "strategy group"),
        (weights(strategy="block"), "strategy block without block_structure"),
        (weights(symmetric=False), "asymmetric weights"),
        ("fp8", "it should be an object, not 'fp8'"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path, raw, message):
    refused = refusal(make_text(tmp_path / "model", "llama"), raw)
    assert message in refused and "supported is fp8 (e4m3)" in refused
