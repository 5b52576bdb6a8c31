"""Experts in fp8 compute what Transformers computes with their dequantised weights."""

from __future__ import annotations

import pytest
import torch

from engine.errors import CheckpointError
from engine.kernels.fp8 import FP8
from tests.engine.families.ernie4_5_vl import make_ernie4_5_vl
from tests.engine.families.qwen import make_qwen3_vl_moe
from tests.engine.fp8_files import Scheme, quantise
from tests.engine.tiny import make_text, rewrite_json, rewrite_tensors
from tests.engine.weights.checkpoints import Rank, load, logits, reference

MATRIX = r".*layers\.\d+\.(?:self_attn|mlp|block_sparse_moe)\.(?:experts\.\d+\.|shared_expert\.)?\w+\.weight"
SCHEMES = {
    "native, blocks": Scheme(True, "block", block=(16, 16)),
    "native, per tensor": Scheme(True, "tensor", static=True),
    "compressed, per channel": Scheme(False, "channel"),
}
BLOCK = 16


def matrix(weights, expert: int) -> torch.Tensor:
    return weights.matrices.one(expert, torch.float32)


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_logits_are_those_of_the_dequantised_weights(tmp_path, scheme, kind):
    path = make_text(tmp_path / "model", kind)
    exact = quantise(path, scheme, matrix=MATRIX, ignored=r"mlp\.gate\.|moe\.gate\.|expert_gate")
    decoder = load(path)
    layer = decoder.layers[0].mlp.experts
    assert layer.gate_up_proj.weight.dtype == layer.down_proj.weight.dtype == FP8
    torch.testing.assert_close(logits(decoder), reference(path, exact), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_experts_of_images_are_counted_on_from_those_of_text(tmp_path, scheme):
    path = make_ernie4_5_vl(tmp_path / "model")
    ignored = r"mlp\.gate\.|shared_experts|vision_model"
    exact = quantise(path, scheme, matrix=MATRIX, ignored=ignored)
    layer, prefix = load(path).layers[1].mlp, "model.layers.1.mlp.experts."
    for experts, first in ((layer.experts, 0), (layer.vision.experts, 6)):
        assert experts.gate_up_proj.weight.dtype == experts.down_proj.weight.dtype == FP8
        for expert in range(6):
            stored = [
                exact[f"{prefix}{first + expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
            ]
            torch.testing.assert_close(matrix(experts.gate_up_proj, expert), torch.cat(stored[:2]))
            torch.testing.assert_close(matrix(experts.down_proj, expert), stored[2])


def blocked(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round matrices ``(E, N, K)`` to fp8 in square blocks: numbers, scales, and what they stand for."""
    experts, rows, columns = tensor.shape
    high, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    scales = torch.empty(experts, high, wide)
    for r in range(high):
        for c in range(wide):
            block = tensor[:, r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK]
            scales[:, r, c] = block.abs().amax(dim=(1, 2)) / 448
    every = scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :rows, :columns]
    numbers = (tensor / every).to(FP8)
    return numbers, scales, numbers.float() * every


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_stored_together(tmp_path, transposed):
    """As in the public checkpoints of Qwen3-VL-MoE, and as Transformers would save them; on several ranks."""
    path = make_qwen3_vl_moe(tmp_path / "model", moe_intermediate_size=96)
    exact = {}

    def change(tensors):
        made = dict(tensors)
        for name, tensor in tensors.items():
            if ".experts." in name:
                given = tensor.transpose(1, 2).contiguous() if transposed else tensor
                made[name], made[f"{name}_scale_inv"], plain = blocked(given)
                exact[name] = plain.transpose(1, 2) if transposed else plain
        return made

    rewrite_tensors(path, change)
    scheme = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    rewrite_json(path / "config.json", {"quantization_config": scheme})
    prefix = "model.language_model.layers.1.mlp.experts."
    gate_up, down = exact[prefix + "gate_up_proj"], exact[prefix + "down_proj"]
    whole = load(path).layers[1].mlp.experts
    ranks = [load(path, Rank(rank, 2)).layers[1].mlp.experts for rank in range(2)]
    for weights in (part for layer in (whole, *ranks) for part in (layer.gate_up_proj, layer.down_proj)):
        scale = weights.matrices.scale
        alike = scale.values.unflatten(0, (6, len(weights.parts), -1, scale.outputs))
        assert scale.outputs == BLOCK and (alike == alike[:, :, :, :1]).all()
    for expert in range(6):
        assert torch.equal(matrix(whole.gate_up_proj, expert), gate_up[expert])
        assert torch.equal(matrix(whole.down_proj, expert), down[expert])
        shards = [matrix(rank.gate_up_proj, expert).unflatten(0, (2, -1)) for rank in ranks]
        assert torch.equal(torch.cat(shards, dim=1).flatten(0, 1), gate_up[expert])
        assert torch.equal(torch.cat([matrix(rank.down_proj, expert) for rank in ranks], dim=1), down[expert])


@pytest.mark.parametrize("kind", ["qwen3_moe", "granitemoe"])
def test_experts_are_rounded_as_they_are_loaded(tmp_path, kind):
    path = make_text(tmp_path / "model", kind)
    plain, rounded = load(path).layers[1].mlp.experts, load(path, quantization="fp8").layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        ours, theirs = getattr(rounded, name), getattr(plain, name)
        assert ours.weight.dtype == FP8
        for expert in range(ours.count):
            error = (matrix(ours, expert) - theirs.weight[expert]).abs()
            scale = ours.scale[expert]
            bound = torch.maximum(theirs.weight[expert].abs() * 2.0**-4, scale * 2.0**-10) * 1.001
            assert (error <= bound).all() and error.amax() > 0


def test_scales_that_may_be_transposed_are_refused(tmp_path):
    path = make_qwen3_vl_moe(tmp_path / "model")

    def change(tensors):
        made = dict(tensors)
        for name, tensor in tensors.items():
            if ".experts." in name:
                made[name] = tensor.to(FP8)
                made[f"{name}_scale_inv"] = torch.ones(6, 1, 1)
        return made

    rewrite_tensors(path, change)
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    rewrite_json(path / "config.json", {"quantization_config": scheme})
    with pytest.raises(CheckpointError, match="holds all experts in fp8"):
        load(path)
