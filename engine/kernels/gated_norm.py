"""RMS norm of each head, times a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute ``weight * x / sqrt(mean(x²) + eps) * silu(gate)`` over the last dimension.

    It rounds as Transformers' Qwen3_5RMSNormGated: normalise in float32, cast to the dtype, scale, and gate
    in float32.

    Args:
        x: ``(T, heads, D)`` contiguous.
        gate: ``(T, heads * D)``, last dimension contiguous, dtype of ``x``.
        weight: ``(D,)``, dtype of ``x``.

    Returns:
        ``(T, heads * D)`` contiguous.
    """
    run = gated_norm_triton if use_triton(x) else gated_norm_reference
    return run(x, gate, weight, eps)


def gated_norm_reference(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return (normed.flatten(1) * F.silu(gate.float())).to(x.dtype)


def gated_norm_triton(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    tokens, heads, dim = x.shape
    assert x.is_contiguous() and gate.stride(-1) == 1
    out = torch.empty((tokens, heads * dim), dtype=x.dtype, device=x.device)
    if tokens:
        launch(
            _gated_norm_kernel, (tokens, heads),
            x_ptr=x, gate_ptr=gate, weight_ptr=weight, out_ptr=out, gate_stride=gate.stride(0), eps=eps,
            HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), num_warps=1, **pdl_options(x),
        )  # fmt: skip
    return out


@triton.jit
def _gated_norm_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr, gate_stride, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    mask = column < DIM
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    place = (token * HEADS + head) * DIM + column
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    dtype = x.dtype
    wide = x.to(tl.float32)
    normed = (wide / tl.sqrt(tl.sum(wide * wide, axis=0) / DIM + eps)).to(dtype).to(tl.float32)
    gate = tl.load(gate_ptr + token * gate_stride + head * DIM + column, mask=mask, other=0.0).to(tl.float32)
    scaled = (normed * weight).to(dtype).to(tl.float32)
    tl.store(out_ptr + place, (scaled * (gate / (1.0 + tl.exp(-gate)))).to(dtype), mask=mask)
