"""Layer norm, with the residual addition before it in the same kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.fp8 import RoundedRows, quantise_rows_reference, reads_fp8, rounding_warps, store_rounded
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


def layer_norm_rounded(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[RoundedRows, torch.Tensor]:
    """Compute :func:`add_layer_norm` and round its rows to fp8; ``residual`` None adds nothing."""
    run = use_triton(x) and reads_fp8(x.device)
    return (layer_norm_rounded_triton if run else layer_norm_rounded_reference)(
        x, residual, weight, bias, eps
    )


def layer_norm_rounded_reference(x, residual, weight, bias, eps):
    total = x if residual is None else x + residual
    return quantise_rows_reference(F.layer_norm(total, weight.shape, weight, bias, eps)), total


def add_layer_norm_triton(x, residual, weight, bias, eps):
    out = torch.empty_like(x)
    return out, _launch(x, residual, weight, bias, eps, out, None)


def layer_norm_rounded_triton(x, residual, weight, bias, eps):
    out = RoundedRows.empty(*x.shape, x.device)
    return out, _launch(x, residual, weight, bias, eps, *out)


def _launch(x, residual, weight, bias, eps, out, row_scale):
    """Write the norm to ``out``, rounded if its rows have scales to write, and return the sum."""
    rows, size = x.shape
    assert x.is_contiguous() and (
        residual is None or (residual.is_contiguous() and residual.shape == x.shape)
    )
    total = x if residual is None else torch.empty_like(x)
    rounded = row_scale is not None
    if rows:
        block = triton.next_power_of_2(size)
        warps = rounding_warps(block, rows) if rounded else 1 if block <= 256 else 4
        launch(
            _layer_norm_kernel, (rows,),
            x_ptr=x, residual_ptr=x if residual is None else residual, weight_ptr=weight, bias_ptr=bias,
            out_ptr=out, row_scale_ptr=row_scale if rounded else out, total_ptr=total, eps=eps, SIZE=size,
            BLOCK=block, ADD=residual is not None, ROUND=rounded, num_warps=warps, **pdl_options(x),
        )  # fmt: skip
    return total


@triton.jit
def _layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, row_scale_ptr, total_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    total = tl.load(x_ptr + row * SIZE + column, mask=mask, other=0.0)
    dtype = total.dtype
    if ADD:
        added = tl.load(residual_ptr + row * SIZE + column, mask=mask, other=0.0)
        total = (total.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * SIZE + column, total, mask=mask)
    wide = total.to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide, axis=0) / SIZE, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / SIZE + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    normed = (centred * scale * weight + bias).to(dtype)
    if ROUND:
        store_rounded(normed.to(tl.float32), row, column, SIZE, mask, out_ptr, row_scale_ptr)
    else:
        tl.store(out_ptr + row * SIZE + column, normed, mask=mask)
