"""Layer norm, with the residual addition before it in the same kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer norm of ``x + residual``, and the sum itself; the sum is rounded to the input's dtype
    first.

    Args:
        x, residual: ``(N, H)`` contiguous.
        weight, bias: ``(H,)``.

    Returns:
        Both ``(N, H)`` in the dtype of ``x``. The norm is computed in float32 and rounded once.
    """
    run = add_layer_norm_triton if use_triton(x) else add_layer_norm_reference
    return run(x, residual, weight, bias, eps)


def add_layer_norm_reference(x, residual, weight, bias, eps):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def add_layer_norm_triton(x, residual, weight, bias, eps):
    rows, size = x.shape
    assert x.is_contiguous() and residual.is_contiguous() and residual.shape == x.shape
    out, total = torch.empty_like(x), torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(size)
        launch(
            _add_layer_norm_kernel, (rows,),
            x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias, out_ptr=out, total_ptr=total,
            eps=eps, SIZE=size, BLOCK=block, num_warps=1 if block <= 256 else 4, **pdl_options(x),
        )  # fmt: skip
    return out, total


@triton.jit
def _add_layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64) * SIZE
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    x = tl.load(x_ptr + row + column, mask=mask, other=0.0)
    added = tl.load(residual_ptr + row + column, mask=mask, other=0.0)
    total = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + row + column, total, mask=mask)
    wide = total.to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide, axis=0) / SIZE, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / SIZE + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + column, (centred * scale * weight + bias).to(x.dtype), mask=mask)
