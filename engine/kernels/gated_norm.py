"""RMS norm of each head, times a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import MEMORY_BOUND_ROWS, use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous

#: Heads of tokens that a program of a prompt takes.
_ROWS = 16


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
    # A decode step needs all the programs it can get; a prompt has enough.
    rows = 1 if tokens <= MEMORY_BOUND_ROWS else _ROWS
    if tokens:
        launch(
            _gated_norm_kernel, (triton.cdiv(tokens * heads, rows),),
            x_ptr=x, gate_ptr=gate, weight_ptr=weight, out_ptr=out,
            total=tokens * heads, gate_stride=gate.stride(0), eps=eps,
            HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=rows, num_warps=1 if rows == 1 else 4,
            **pdl_options(x),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["total"])
def _gated_norm_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr, total, gate_stride, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for ``ROWS`` of the ``total`` rows; each is a head of a token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < total)[:, None] & (column < DIM)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    place = row[:, None] * DIM + column[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    dtype = x.dtype
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / DIM + eps)
    normed = (wide * scale[:, None]).to(dtype).to(tl.float32)
    source = (row // HEADS * gate_stride + row % HEADS * DIM)[:, None] + column[None, :]
    gate = tl.load(gate_ptr + source, mask=mask, other=0.0).to(tl.float32)
    scaled = (normed * weight[None, :]).to(dtype).to(tl.float32)
    tl.store(out_ptr + place, (scaled * (gate / (1.0 + tl.exp(-gate)))).to(dtype), mask=mask)
