"""The output gate of attention: ``x * sigmoid(gate)``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute ``x * sigmoid(gate)``; the sigmoid is rounded to the dtype before the product, as in torch.

    Args:
        x: ``(T, heads, D)`` contiguous.
        gate: ``(T, heads, D)``, last dimension contiguous, or ``(T, heads, 1)``; dtype of ``x``.

    Returns:
        ``(T, heads, D)`` contiguous.
    """
    run = sigmoid_gate_triton if use_triton(x) else sigmoid_gate_reference
    return run(x, gate)


def sigmoid_gate_reference(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x * gate.sigmoid()


def sigmoid_gate_triton(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    tokens, heads, dim = x.shape
    assert x.is_contiguous() and gate.stride(-1) == 1 and gate.shape in (x.shape, (tokens, heads, 1))
    out = torch.empty_like(x)
    if tokens:
        block = min(1024, triton.next_power_of_2(heads * dim))
        launch(
            _sigmoid_gate_kernel, (tokens, triton.cdiv(heads * dim, block)),
            x_ptr=x, gate_ptr=gate, out_ptr=out, token_stride=gate.stride(0), head_stride=gate.stride(1),
            SIZE=heads * dim, DIM=dim, GATE_DIM=gate.shape[-1], BLOCK=block, num_warps=4, **pdl_options(x),
        )  # fmt: skip
    return out


@triton.jit
def _sigmoid_gate_kernel(
    x_ptr, gate_ptr, out_ptr, token_stride, head_stride,
    SIZE: tl.constexpr, DIM: tl.constexpr, GATE_DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and block of its heads."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    source = gate_ptr + token * token_stride + column // DIM * head_stride + column % GATE_DIM
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + token * SIZE + column, mask=mask, other=0.0)
    factor = (1.0 / (1.0 + tl.exp(-gate))).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + token * SIZE + column, (x.to(tl.float32) * factor).to(x.dtype), mask=mask)
