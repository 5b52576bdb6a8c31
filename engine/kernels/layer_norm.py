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
from engine.kernels.split_sums import (
    Pair,
    SplitSums,
    Unfinished,
    load_result,
    rounded_sum,
    tensor_and_parts,
    whole,
)


def add_layer_norm(
    x: torch.Tensor | Unfinished,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer norm of ``x + residual``, and the sum itself; the sum is rounded to the input's dtype
    first.

    Args:
        x, residual: ``(N, H)`` contiguous; ``x`` may be unfinished.
        weight, bias: ``(H,)``; None for no bias.

    Returns:
        Both ``(N, H)`` in the dtype of ``x``. The norm is computed in float32 and rounded once.
    """
    run = add_layer_norm_triton if use_triton(residual) else add_layer_norm_reference
    return run(x, residual, weight, bias, eps)


def add_layer_norm_reference(x, residual, weight, bias, eps):
    total = _sum(x, residual)
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def _sum(x, residual):
    """Add ``x`` to the residual, or both of a pair one after the other; ``residual`` None adds nothing."""
    if residual is None:
        return whole(x)
    if isinstance(x, Pair):
        return _sum(x.second, _sum(x.first, residual))
    return residual + whole(x)


def layer_norm_rounded(
    x: torch.Tensor | Unfinished,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[RoundedRows, torch.Tensor]:
    """Compute :func:`add_layer_norm` and round its rows to fp8; ``residual`` None adds nothing."""
    given = residual if residual is not None else whole(x)
    run = use_triton(given) and reads_fp8(given.device)
    return (layer_norm_rounded_triton if run else layer_norm_rounded_reference)(
        x if residual is not None else given, residual, weight, bias, eps
    )


def layer_norm_rounded_reference(x, residual, weight, bias, eps):
    total = _sum(x, residual)
    return quantise_rows_reference(F.layer_norm(total, weight.shape, weight, bias, eps)), total


def add_layer_norm_triton(x, residual, weight, bias, eps):
    out = torch.empty_like(residual)
    return out, _launch(x, residual, weight, bias, eps, out, None)


def layer_norm_rounded_triton(x, residual, weight, bias, eps):
    out = RoundedRows.empty(*x.shape, x.device)
    return out, _launch(x, residual, weight, bias, eps, *out)


def _launch(x, residual, weight, bias, eps, out, row_scale):
    """Write the norm to ``out``, rounded if its rows have scales to write, and return the sum."""
    rows, size = x.shape
    first = x.first if isinstance(x, Pair) else None
    if isinstance(x, Pair):
        x = x.second
    elif not isinstance(x, SplitSums):
        x = whole(x)
    # A tensor of the shape, the dtype and the device of all.
    like = x if residual is None else residual
    (source, parts), (first_source, first_parts) = map(
        tensor_and_parts, (x, like if first is None else first)
    )
    assert source.is_contiguous() and first_source.is_contiguous()
    assert like is x or (like.is_contiguous() and like.shape == x.shape)
    total = like if residual is None else torch.empty_like(like)
    rounded = row_scale is not None
    if rows:
        block = triton.next_power_of_2(size)
        warps = rounding_warps(block, rows) if rounded else 1 if block <= 256 else 4
        if parts or first_parts:
            # As many as for the RMS norm of parts.
            warps = max(4, min(32, block // 128))
        launch(
            _layer_norm_kernel, (rows,),
            x_ptr=source, first_ptr=first_source, residual_ptr=like, weight_ptr=weight,
            bias_ptr=weight if bias is None else bias, out_ptr=out, row_scale_ptr=row_scale if rounded else out,
            total_ptr=total, eps=eps, rows=rows, SIZE=size, BLOCK=block, PARTS=parts, FIRST=first is not None,
            FIRST_PARTS=first_parts, ADD=residual is not None, SHIFT=bias is not None, ROUND=rounded,
            num_warps=warps, **pdl_options(like),
        )  # fmt: skip
    return total


# ``rows`` differs between batches; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["rows"])
def _layer_norm_kernel(
    x_ptr, first_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, row_scale_ptr, total_ptr, eps, rows,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr, FIRST_PARTS: tl.constexpr,
    ADD: tl.constexpr, SHIFT: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row.

    Args:
        x_ptr, first_ptr: see :func:`~engine.kernels.split_sums.load_result`. With FIRST the latter's rows are added
            to the residual first.
    """
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    dtype = total_ptr.dtype.element_ty
    total = load_result(x_ptr, row, rows, column, mask, dtype, PARTS, SIZE)
    if ADD:
        added = tl.load(residual_ptr + row * SIZE + column, mask=mask, other=0.0)
        if FIRST:
            added = rounded_sum(
                load_result(first_ptr, row, rows, column, mask, dtype, FIRST_PARTS, SIZE), added
            )
        total = rounded_sum(total, added)
        tl.store(total_ptr + row * SIZE + column, total, mask=mask)
    wide = total.to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide, axis=0) / SIZE, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / SIZE + eps)
    normed = centred * scale * tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if SHIFT:
        normed += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    normed = normed.to(dtype)
    if ROUND:
        store_rounded(normed.to(tl.float32), row, column, SIZE, mask, out_ptr, row_scale_ptr)
    else:
        tl.store(out_ptr + row * SIZE + column, normed, mask=mask)
