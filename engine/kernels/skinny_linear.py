"""A linear layer for the few rows of a decode step: the weight is read once, by as many programs as fill the GPU.

Where the outputs alone make too few programs, the inputs are split over several (split-K): each leaves a
partial sum in float32, and a second kernel adds them in a fixed order, so that a result never depends on who
came first. One row is a plain sum of products; more go through the matrix unit, whose smallest tile has 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton

#: More rows than this are no longer bound by reading the weight alone.
MAX_ROWS = 16
_MAX_SPLITS = 16
#: About four for each processor of a large GPU.
_PROGRAMS = 512


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32 and rounded once.

    Args:
        x: ``(B, K)``, last dimension contiguous; more than ``MAX_ROWS`` rows are left to torch.
        weight: ``(N, K)``, last dimension contiguous, dtype of ``x``.
        bias: ``(N,)``.

    Returns:
        ``(B, N)`` in the dtype of ``x``.
    """
    fits = x.shape[0] <= MAX_ROWS and use_triton(x)
    return (skinny_linear_triton if fits else skinny_linear_reference)(x, weight, bias)


def skinny_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return F.linear(x, weight, bias)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Outputs and inputs per tile, programs that share the inputs of an output, and loads under way."""

    outputs: int
    inputs: int
    splits: int
    stages: int


def tiling(rows: int, outputs: int, inputs: int, itemsize: int) -> Tiling:
    """The tile for a problem; the one place where this is decided."""
    tile_outputs, tile_inputs = (8, 512) if rows == 1 else (32, 256 // itemsize)
    tiles = -(-inputs // tile_inputs)
    wanted = min(-(-_PROGRAMS // -(-outputs // tile_outputs)), _MAX_SPLITS, tiles)
    # As many as get a tile when each takes the same number.
    splits = -(-tiles // -(-tiles // wanted))
    return Tiling(tile_outputs, tile_inputs, splits, 4)


def skinny_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows, inputs = x.shape
    outputs = weight.shape[0]
    assert rows <= MAX_ROWS and weight.shape[1] == inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and x.dtype == weight.dtype
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if rows == 0 or outputs == 0:
        return out
    tile = tiling(rows, outputs, inputs, x.element_size())
    partial = out
    if tile.splits > 1:
        partial = torch.empty((tile.splits, rows, outputs), dtype=torch.float32, device=x.device)
    _skinny_kernel[(triton.cdiv(outputs, tile.outputs), tile.splits)](
        x,
        weight,
        out if bias is None else bias,
        partial,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        ROWS=1 if rows == 1 else 16,
        TILE_OUTPUTS=tile.outputs,
        TILE_INPUTS=tile.inputs,
        SPLITS=tile.splits,
        BIAS=bias is not None and tile.splits == 1,
        num_warps=4,
        num_stages=tile.stages,
    )
    if tile.splits > 1:
        block = 256
        _sum_kernel[(triton.cdiv(outputs, block), rows)](
            partial,
            out if bias is None else bias,
            out,
            rows,
            outputs,
            SPLITS=tile.splits,
            BIAS=bias is not None,
            BLOCK=block,
            num_warps=2,
        )
    return out


@triton.jit
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
):
    split = tl.program_id(1)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = tl.arange(0, ROWS)
    share = tl.cdiv(tl.cdiv(inputs, TILE_INPUTS), SPLITS) * TILE_INPUTS
    start = split * share
    end = tl.minimum(start + share, inputs)
    weights = weight_ptr + output.to(tl.int64) * weight_stride
    if ROWS == 1:
        products = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float32)
        for first in range(start, end, TILE_INPUTS):
            k = first + tl.arange(0, TILE_INPUTS)
            mask = (output < outputs)[:, None] & (k < end)[None, :]
            weight = tl.load(weights[:, None] + k[None, :], mask=mask, other=0.0)
            x = tl.load(x_ptr + k, mask=k < end, other=0.0)
            products += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        total = tl.sum(products, axis=1)[None, :]
    else:
        total = tl.zeros([ROWS, TILE_OUTPUTS], tl.float32)
        for first in range(start, end, TILE_INPUTS):
            k = first + tl.arange(0, TILE_INPUTS)
            mask = (output < outputs)[None, :] & (k < end)[:, None]
            weight = tl.load(weights[None, :] + k[:, None], mask=mask, other=0.0)
            x_mask = (row < rows)[:, None] & (k < end)[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)
            total = tl.dot(x, weight, total, input_precision="ieee")
    if BIAS:
        bias = tl.load(bias_ptr + output, mask=output < outputs, other=0.0)
        total += bias.to(tl.float32)[None, :]
    place = (split * rows + row).to(tl.int64)[:, None] * outputs + output[None, :]
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    partial_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = output < outputs
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial_ptr + (split * rows + row) * outputs + output, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * outputs + output, total.to(out_ptr.dtype.element_ty), mask=inside)
