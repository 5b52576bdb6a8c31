"""Layer norm, with the residual addition before it in the same kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import MEMORY_BOUND_ROWS, use_triton
from engine.kernels.fp8 import (
    RoundedRows,
    RoundTile,
    quantise_rows_reference,
    reads_fp8,
    rounding_warps,
    scale_of_row,
)
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

#: Numbers of a row that a warp keeps where rows are many.
_MANY_NUMBERS = 1280


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
        tile = choose_norm_tile(rows, size, rounded=rounded, parts=bool(parts or first_parts))
        launch(
            _layer_norm_kernel, (rows,),
            x_ptr=source, first_ptr=first_source, residual_ptr=like, weight_ptr=weight,
            bias_ptr=weight if bias is None else bias, out_ptr=out, row_scale_ptr=row_scale if rounded else out,
            total_ptr=total, eps=eps, rows=rows, SIZE=size, CHUNK=tile.chunk, PARTS=parts, FIRST=first is not None,
            FIRST_PARTS=first_parts, ADD=residual is not None, SHIFT=bias is not None, ROUND=rounded,
            num_warps=tile.warps, **pdl_options(like),
        )  # fmt: skip
    return total


def choose_norm_tile(rows: int, size: int, *, rounded: bool, parts: bool) -> RoundTile:
    """Choose the numbers of a row that a program handles at a time: eight a thread, so that loads are of 16 bytes.

    With many rows each has so few warps that the programs of 1664 rows of 1280 run at once on an H200, and one warp
    waits for no other. With few the time is that of one program.
    """
    padded = triton.next_power_of_2(size)
    if parts:
        # As many as for the RMS norm of parts.
        warps = max(4, min(32, padded // 128))
    elif rows <= MEMORY_BOUND_ROWS:
        warps = rounding_warps(padded, rows) if rounded else 1 if padded <= 256 else 4
    else:
        warps = min(16, triton.next_power_of_2(triton.cdiv(size, _MANY_NUMBERS)))
    return RoundTile(min(warps * 256, padded), warps)


# ``rows`` differs between batches; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["rows"])
def _layer_norm_kernel(
    x_ptr, first_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, row_scale_ptr, total_ptr, eps, rows,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr, FIRST_PARTS: tl.constexpr,
    ADD: tl.constexpr, SHIFT: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row.

    Args:
        x_ptr, first_ptr: see :func:`~engine.kernels.split_sums.load_result`. With FIRST the latter's rows are added
            to the residual first.
    """
    lane = tl.arange(0, CHUNK)
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    # All that doesn't depend on the previous kernel, then all of the row, is loaded before the first is used.
    weights = ()
    shifts = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + lane
        weights = weights + (tl.load(weight_ptr + column, mask=column < SIZE, other=0.0),)
        if SHIFT:
            shifts = shifts + (tl.load(bias_ptr + column, mask=column < SIZE, other=0.0),)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    dtype = total_ptr.dtype.element_ty
    results = ()
    firsts = ()
    residuals = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + lane
        mask = column < SIZE
        results = results + (load_result(x_ptr, row, rows, column, mask, dtype, PARTS, SIZE),)
        if ADD:
            residuals = residuals + (tl.load(residual_ptr + row * SIZE + column, mask=mask, other=0.0),)
            if FIRST:
                first = load_result(first_ptr, row, rows, column, mask, dtype, FIRST_PARTS, SIZE)
                firsts = firsts + (first,)
    totals = ()
    sums = tl.zeros([CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + lane
        total = results[chunk]
        if ADD:
            added = residuals[chunk]
            if FIRST:
                added = rounded_sum(firsts[chunk], added)
            total = rounded_sum(total, added)
            tl.store(total_ptr + row * SIZE + column, total, mask=column < SIZE)
        totals = totals + (total,)
        sums += total.to(tl.float32)
    mean = tl.sum(sums, axis=0) / SIZE
    squares = tl.zeros([CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        centred = tl.where(chunk * CHUNK + lane < SIZE, totals[chunk].to(tl.float32) - mean, 0.0)
        squares += centred * centred
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / SIZE + eps)
    norms = ()
    largest = tl.zeros([CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        # Weights beyond the row are zero, and so is the norm there.
        normed = (totals[chunk].to(tl.float32) - mean) * inverse * weights[chunk].to(tl.float32)
        if SHIFT:
            normed += shifts[chunk].to(tl.float32)
        normed = normed.to(dtype)
        largest = tl.maximum(largest, tl.abs(normed.to(tl.float32)))
        norms = norms + (normed,)
    if ROUND:
        scale = scale_of_row(tl.max(largest, axis=0))
        tl.store(row_scale_ptr + row, scale)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + lane
        result = norms[chunk]
        if ROUND:
            # Times the inverse: a division of each number would take longer than reading it.
            result = (result.to(tl.float32) * (1.0 / scale)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * SIZE + column, result, mask=column < SIZE)
