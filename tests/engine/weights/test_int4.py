"""Checkpoints in int4 compute what Transformers computes with their dequantised weights."""

from __future__ import annotations

import json
import re

import pytest
import torch

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, ConfigError
from engine.families.load import load_vision_encoder
from engine.families.registry import resolve
from engine.kernels.int4 import dequantise_int4, unpack
from tests.engine.int4_files import Scheme, quantise
from tests.engine.quantised_files import MATRIX
from tests.engine.tiny import make_qwen2_vl, make_text, rewrite_json, rewrite_tensors
from tests.engine.weights.checkpoints import (
    CPU,
    Rank,
    answers,
    check_outputs_are_split,
    load,
    logits,
    reference,
    refusal,
)

SCHEMES = {
    "gptq": Scheme("gptq"),
    "gptq, symmetric, groups of 32": Scheme("gptq", 32, symmetric=True),
    "gptq, one group": Scheme("gptq", -1),
    "gptq, activation order": Scheme("gptq", shuffled=True),
    "gptq v2": Scheme("gptq_v2", 32, shuffled=True),
    "awq": Scheme("awq"),
    "awq, one group": Scheme("awq", -1),
    "packed": Scheme("packed"),
    "packed, symmetric": Scheme("packed", 32, symmetric=True),
    "packed, one group": Scheme("packed", -1),
    "packed, activation order": Scheme("packed", 16, shuffled=True),
}
TEXT_MATRIX = r"(?!.*visual)" + MATRIX


def matrix(layer):
    """The rank's weight; its inputs are in the order of the layer's input."""
    wide = dequantise_int4(layer.weight, layer.scale, torch.float32)
    if layer.scale.order is None:
        return wide
    return wide[:, layer.scale.order.argsort()]


@pytest.mark.parametrize("kind", ["llama3", "phi3"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_logits_are_those_of_the_dequantised_weights(tmp_path, scheme, kind):
    path = make_text(tmp_path / "model", kind)
    exact = quantise(path, scheme)
    decoder = load(path)
    attention, mlp = decoder.layers[1].self_attn, decoder.layers[1].mlp
    assert attention.qkv_proj.weight.dtype == mlp.gate_up_proj.weight.dtype == torch.int16
    assert torch.equal(matrix(mlp.down_proj), exact["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(matrix(attention.o_proj), exact["model.layers.1.self_attn.o_proj.weight"])
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["cohere2", "exaone4"])
def test_so_are_those_of_layers_whose_norms_stand_elsewhere(tmp_path, kind):
    path = make_text(tmp_path / "model", kind)
    exact = quantise(path, Scheme("gptq", shuffled=True))
    decoder = load(path)
    assert decoder.layers[1].self_attn.qkv_proj.weight.dtype == torch.int16
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


def test_numbers_are_those_of_compressed_tensors():
    """Its own function packs the same words."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    made = Scheme("packed").quantise(torch.randn(24, 32), torch.arange(32) // 16)
    ours = Scheme("packed").tensors("", made)
    assert torch.equal(ours["weight_packed"], pack_to_int32((made.numbers - 8).to(torch.int8), 4))
    zeros = pack_to_int32((made.zeros - 8).to(torch.int8), 4, packed_dim=0)
    assert torch.equal(ours["weight_zero_point"], zeros)


def test_a_zero_point_of_zero_borrows_from_its_neighbour(tmp_path):
    """As GPTQModel stores and reads the first version of GPTQ: it subtracts and adds whole words."""
    path = make_text(tmp_path / "model", "llama")
    exact = quantise(path, Scheme("gptq"))
    name = "model.layers.0.mlp.down_proj"

    def change(tensors):
        zeros = tensors[f"{name}.qzeros"]
        zeros[0, 0] = -0x11111111
        return tensors

    rewrite_tensors(path, change)
    found, before = matrix(load(path).layers[0].mlp.down_proj), exact[f"{name}.weight"]
    # All eight outputs of the first word and group have a zero point of 0.
    assert (found[:8, :16] >= 0).all() and not (before[:8, :16] >= 0).all()
    assert torch.equal(found[8:], before[8:]) and torch.equal(found[:, 16:], before[:, 16:])


def test_layers_that_are_not_converted_keep_their_dtype(tmp_path):
    path = make_text(tmp_path / "model", "llama")
    exact = quantise(path, Scheme("awq"), ignored=r"layers\.0\.|down_proj")
    decoder = load(path)
    layers = decoder.layers
    kinds = [(layer.self_attn.qkv_proj.weight.dtype, layer.mlp.down_proj.weight.dtype) for layer in layers]
    assert kinds == [(torch.float32, torch.float32), (torch.int16, torch.float32)]
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_ranks_have_their_shares(tmp_path, scheme, kind):
    path = make_text(tmp_path / "model", kind, intermediate_size=128)
    quantise(path, scheme)
    whole, ranks = load(path), [load(path, Rank(rank, 2)) for rank in range(2)]
    check_outputs_are_split(whole, ranks, matrix)
    # Each rank computes with its own inputs, or with those of its groups out of all.
    x = torch.randn(5, 128)
    down = [rank.layers[1].mlp.down_proj for rank in ranks]
    gathered = down[0].packed.gathers
    assert gathered == scheme.shuffled
    parts = [x, x] if gathered else x.chunk(2, 1)
    found = [layer.partial(part) for layer, part in zip(down, parts, strict=True)]
    expected = whole.layers[1].mlp.down_proj(x)
    torch.testing.assert_close(sum(found), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], expected, rtol=1e-2, atol=1e-2)
    assert {layer.weight.shape[0] for layer in down} == {64} and down[0].scale.inputs == 64


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (Scheme("gptq", 64), {}, "cuts a group of 64 inputs of the int4 weights of layers.0.mlp.down_proj"),
        (Scheme("awq", -1), {"intermediate_size": 88}, "cuts a group of 8 inputs"),
        (Scheme("awq"), {"head_dim": 4}, "cut a word of eight int4 numbers"),
    ],
)
def test_ranks_that_would_cut_groups_or_words_are_refused(tmp_path, scheme, change, message):
    path = make_text(tmp_path / "model", "llama", **change)
    quantise(path, scheme)
    with pytest.raises(ConfigError) as caught:
        load(path, Rank(0, 2))
    assert message in caught.value.message and caught.value.param == "tensor_parallel_size"


@pytest.mark.parametrize("kind", ["llama3", "qwen2_moe"])
@pytest.mark.parametrize(
    "scheme", [Scheme("gptq", 32), Scheme("awq", -1), Scheme("packed")], ids=lambda s: s.layout
)
def test_dummy_weights_have_any_numbers(tmp_path, kind, scheme):
    """They are in int4 because config.json says so: there are no tensors."""
    path = make_text(tmp_path / "model", kind)
    rewrite_json(path / "config.json", {"quantization_config": scheme.config([])})
    (path / "model.safetensors").unlink()
    decoder = load(path, load_format="dummy")
    layers = [layer for layer in decoder.modules() if hasattr(layer, "packed")]
    assert len(layers) >= 8 and {layer.weight.dtype for layer in layers} == {torch.int16}
    projection = decoder.layers[0].self_attn.o_proj
    assert unpack(projection.weight, decoder.config.hidden_size).unique().tolist() == list(range(16))
    assert projection.scale.zeros.unique().numel() > 8
    assert matrix(projection).std() > 0.05 and logits(decoder).isfinite().all()


def test_a_part_may_state_the_scheme(tmp_path):
    """As where a quantiser was given the language model of a larger one."""
    path = make_text(tmp_path / "model", "llama")
    exact = quantise(path, Scheme("awq"))
    config = json.loads((path / "config.json").read_text())
    stated = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps({**config, "llm_config": {"quantization_config": stated}}))
    torch.testing.assert_close(logits(load(path)), reference(path, exact), rtol=2e-4, atol=2e-4)


def test_answers_about_an_image_are_those_of_the_dequantised_checkpoint(tmp_path):
    path = make_qwen2_vl(tmp_path / "model")
    exact = quantise(path, Scheme("awq"), matrix=TEXT_MATRIX)
    quantised, plain = (output.outputs[0] for output in answers(path, exact))
    assert quantised.token_ids == plain.token_ids
    checkpoint = Checkpoint.open(str(path))
    config = resolve(checkpoint).parse(checkpoint)
    tower = load_vision_encoder(checkpoint, config, device=CPU, dtype=torch.float32)
    assert {p.dtype for p in tower.parameters()} == {torch.float32}


def with_tensor(name, tensor):
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {name: v for name, v in t.items() if name != "model.layers.1.mlp.down_proj.scales"},
            r"layers\.1\.mlp\.down_proj\.qweight is in int4 and has no scales",
        ),
        (
            with_tensor("lm_head.qweight", torch.zeros(8, 320, dtype=torch.int32)),
            r"no matrix of a decoder layer are not supported: lm_head\.qweight",
        ),
        (
            with_tensor("model.layers.0.self_attn.q_proj.scales", torch.ones(3, 64).half()),
            r"q_proj\.scales.* has shape \[3, 64\]",
        ),
        (
            with_tensor("model.layers.0.self_attn.q_proj.scales", torch.ones(4, 64).double()),
            r"q_proj\.scales has dtype F64; scales of int4 should be F16, BF16, F32",
        ),
        (
            with_tensor("model.norm.weight", torch.ones(64, dtype=torch.int32)),
            r"tensor model\.norm\.weight .* has dtype I32",
        ),
        (
            with_tensor("model.layers.0.self_attn.q_proj.g_idx", torch.zeros(64, dtype=torch.int32)),
            r"layers\.0\.self_attn\.qkv_proj",
        ),
        (
            with_tensor("model.layers.0.mlp.down_proj.g_idx", torch.zeros(96, dtype=torch.int32)),
            r"down_proj: g_idx has groups of other sizes than 16 inputs",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, change, message):
    path = make_text(tmp_path / "model", "llama")
    quantise(path, Scheme("gptq"))
    rewrite_tensors(path, change)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_the_model_lacks_are_left_out_if_they_are_zero(tmp_path, value):
    """AutoGPTQ stores biases of zeros for all matrices."""
    path = make_text(tmp_path / "model", "llama")
    exact = quantise(path, Scheme("gptq"))
    names = [f"model.layers.{layer}.mlp.down_proj.bias" for layer in range(2)]
    biases = {
        names[0]: torch.zeros(64).half(),
        names[1]: torch.zeros(64).half().index_fill(0, torch.tensor(63), value),
    }
    rewrite_tensors(path, lambda tensors: tensors | biases)
    if value:
        with pytest.raises(CheckpointError, match=rf"doesn't have: {re.escape(names[1])}$"):
            load(path)
    else:
        torch.testing.assert_close(logits(load(path)), reference(path, exact), rtol=2e-4, atol=2e-4)


def test_integers_without_a_configuration_are_refused(tmp_path):
    path = make_text(tmp_path / "model", "llama")
    quantise(path, Scheme("gptq"))
    rewrite_json(path / "config.json", {"quantization_config": None})
    with pytest.raises(CheckpointError, match="has dtype I32; only floating-point weights"):
        load(path)


EXPERT_MATRIX = (
    r".*layers\.\d+\.(?:self_attn|mlp|linear_attn)\.(?:experts\.\d+\.|shared_expert\.)?\w+_proj\.weight"
)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_5_moe"])
@pytest.mark.parametrize(
    "scheme", [Scheme("gptq", 8 * 2), Scheme("awq", -1), Scheme("packed", 16)], ids=lambda s: s.layout
)
def test_experts(tmp_path, kind, scheme):
    path = make_text(tmp_path / "model", kind, moe_intermediate_size=32, shared_expert_intermediate_size=64)
    exact = quantise(path, scheme, matrix=EXPERT_MATRIX)
    decoder = load(path)
    experts = decoder.layers[0].mlp.experts
    assert experts.gate_up_proj.weight.dtype == experts.down_proj.weight.dtype == torch.int16
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)
    ranks = [load(path, Rank(rank, 2)).layers[0].mlp.experts for rank in range(2)] if scheme.group > 0 else []
    for expert in range(6 if ranks else 0):
        both = [rank.gate_up_proj.matrices.one(expert, torch.float32).unflatten(0, (2, -1)) for rank in ranks]
        whole = experts.gate_up_proj.matrices.one(expert, torch.float32)
        assert torch.equal(torch.cat(both, dim=1).flatten(0, 1), whole)
        both = [rank.down_proj.matrices.one(expert, torch.float32) for rank in ranks]
        assert torch.equal(torch.cat(both, dim=1), experts.down_proj.matrices.one(expert, torch.float32))


@pytest.mark.parametrize("layout", ["gptq", "packed"])
@pytest.mark.parametrize(
    "matrices", [EXPERT_MATRIX, r".*experts\.\d+\.down_proj\.weight"], ids=["all", "down"]
)
def test_experts_in_activation_order(tmp_path, layout, matrices):
    """Each expert has an order of its own."""
    path = make_text(tmp_path / "model", "qwen3_moe", moe_intermediate_size=48)
    exact = quantise(path, Scheme(layout, shuffled=True), matrix=matrices)
    decoder = load(path)
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)
    orders = decoder.layers[1].mlp.experts.gate_up_proj.matrices.scale
    if matrices == EXPERT_MATRIX:
        assert orders.order.shape == (8, 64) and not torch.equal(orders.order[0], orders.order[1])
    with pytest.raises(ConfigError, match=r"splits the inputs of layers\.1\.mlp\.experts\.down_proj"):
        load(path, Rank(0, 2))


PACKED = Scheme("packed").config([])


def packed(**change):
    (group,) = PACKED["config_groups"].values()
    weights = {**group["weights"], **change.pop("weights", {})}
    return {**PACKED, "config_groups": {"group_0": {**group, "weights": weights, **change}}}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "bits 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 8}, "group_size 8"),
        ({"quant_method": "gptq", "bits": 4}, "group_size None"),
        ({**Scheme("gptq").config([]), "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({**Scheme("gptq").config([]), "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic '+:.*down.*'"),
        ({**Scheme("gptq").config([]), "pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({**Scheme("awq").config([]), "version": "gemv"}, "version 'gemv'"),
        ({**Scheme("awq").config([]), "zero_point": False}, "zero_point False"),
        ({**Scheme("awq").config([]), "bits": 3}, "bits 3"),
        ({**PACKED, "format": "marlin-24"}, "format 'marlin-24'"),
        (packed(weights={"num_bits": 8}), "weights of type int, 8 bits"),
        (packed(weights={"group_size": 48}), "group_size 48"),
        (packed(input_activations={"num_bits": 8, "type": "int"}), "input_activations beside int4 weights"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path, raw, message):
    refused = refusal(make_text(tmp_path / "model", "llama"), raw)
    assert message in refused and "quant_method 'gptq', 'awq'" in refused
