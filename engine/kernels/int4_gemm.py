"""GEMM of some rows with a weight in 4 bits, which is dequantised inside.

As in :mod:`engine.kernels.skinny_gemm` a tile of weights is the left operand, and split-K fills the GPU. A step
multiplies a chunk of inputs: four products, each of one number of every word with 32 consecutive inputs. Less
its zero point a number is exact in every dtype, so the scale multiplies the sums, in float32. On a GPU numbers
are unpacked two at a time, see :mod:`engine.kernels.int4_unpack`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.device import MEMORY_BOUND_ROWS, num_sms
from engine.kernels.int4 import (
    CHUNK_WORDS,
    Int4Scale,
    group_of,
    int4_arguments,
    number_of,
    scale_of,
    times_factors,
)
from engine.kernels.int4_unpack import minus_zero, unpacked, unpacks
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.skinny_gemm import TILE_OUTPUTS, sum_of_splits

#: Split-K programs have at least this many chunks of inputs, and there are about so many for each SM.
_MIN_SPLIT_CHUNKS, _PROGRAMS = 4, 4
_STAGES, _WARPS = 3, 4


def int4_gemm_triton(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: Int4Scale,
    bias: torch.Tensor | None = None,
    *,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.linear`; without an activation.

    Args:
        counters: see :func:`~engine.kernels.skinny_gemm.split_counters`. None: no split-K.
    """
    (rows, inputs), outputs = x.shape, len(words)
    assert rows > 0 and inputs == scale.inputs and x.stride(1) == 1
    tile_rows = 16 if rows <= 16 else MEMORY_BOUND_ROWS
    row_tiles, tiles = triton.cdiv(rows, tile_rows), triton.cdiv(outputs, TILE_OUTPUTS)
    splits = 1
    if counters is not None and row_tiles == 1:
        assert counters.is_contiguous() and len(counters) >= tiles
        enough = triton.cdiv(_PROGRAMS * num_sms(x.device), tiles)
        splits = max(1, min(enough, words.shape[1] // CHUNK_WORDS // _MIN_SPLIT_CHUNKS))
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    # Without split-K these are never accessed; any tensor does.
    partial = out if splits == 1 else torch.empty((splits, rows, outputs), device=x.device)
    launch(
        _int4_gemm_kernel, (tiles, splits, row_tiles),
        x_ptr=x, bias_ptr=x if bias is None else bias, out_ptr=out, partial_ptr=partial,
        counters_ptr=out if splits == 1 else counters, rows=rows, outputs=outputs, x_stride=x.stride(0),
        splits=splits, **int4_arguments(words, scale), ROWS=tile_rows, TILE_OUTPUTS=TILE_OUTPUTS,
        STAGES=_STAGES, EVEN=inputs % 128 == 0, UNPACK=unpacks(x), SPLIT=splits > 1, BIAS=bias is not None,
        num_warps=_WARPS, **pdl_options(x),
    )  # fmt: skip
    return out


@triton.jit
def chunk_products(
    acc, word, xs, chunk, lane, inputs, scale_ptr, zero_ptr, row, groups, stride, EVEN: tl.constexpr,
    UNPACK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, TILE_OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Add the products of a chunk's weights with the rows to ``acc``.

    Args:
        UNPACK: see :func:`~engine.kernels.int4_unpack.unpacks`.
    """
    HALVES: tl.constexpr = 2 if GROUP == 16 else 1
    # Unpacked by instructions of their own floats are themselves, otherwise twice as much.
    TWICE: tl.constexpr = 2.0 if UNPACK and KIND != "int4" else 1.0
    part = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    for i in tl.static_range(4):
        k = chunk * 128 + i * 32
        if EVEN:
            x = tl.load(xs + k)
        else:
            x = tl.load(xs + k, mask=(k + lane < inputs)[:, None], other=0.0)
        # Groups of 16 inputs are half of these numbers: the others are 0 in their product.
        for half in tl.static_range(HALVES):
            # Groups beyond the last input have no numbers.
            group = tl.minimum(group_of(chunk, half * 16, i, GROUP), groups - 1)
            zero = tl.full([TILE_OUTPUTS], 8, tl.uint8)
            if ZEROS:
                zero = tl.load(zero_ptr + row + group * stride)
            if UNPACK:
                number = unpacked(word, minus_zero(zero, x.dtype)[:, None], i, KIND, x.dtype)
            else:
                number = number_of(word, i, KIND)
                if KIND == "int4":
                    number -= zero.to(tl.float32)[:, None]
            if HALVES == 2:
                number = tl.where((lane // 16 == half)[None, :], number, 0.0)
            part = tl.dot(number.to(x.dtype), x, part, input_precision="ieee")
            if i == 3 or (GROUP > 0 and (i + 1) * 32 % GROUP == 0):
                scale = scale_of(tl.load(scale_ptr + row + group * stride), KIND) * TWICE
                acc += part * scale[:, None]
                part = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    return acc


@triton.jit(do_not_specialize=["rows", "splits", "groups"])
def _int4_gemm_kernel(
    x_ptr, bias_ptr, out_ptr, partial_ptr, counters_ptr, rows, outputs, x_stride, splits,
    weight_ptr, scale_ptr, zero_ptr, factor_ptr, inputs, words, groups, stride, KIND: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    UNPACK: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of outputs, split and tile of rows.

    Args:
        partial_ptr: ``(splits, rows, outputs)`` float32, each split's sums.
        counters_ptr: ``(tiles,)`` int32, splits that have finished.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    output = tile * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, 32)
    # Lanes beyond the last output or row load the last one again; their results are not stored.
    known = tl.minimum(output, outputs - 1).to(tl.int64)
    weights = weight_ptr + known[:, None] * words + lane[None, :]
    xs = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[None, :] * x_stride + lane[:, None]
    chunks = words // 32
    share = tl.cdiv(chunks, splits)
    acc = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    wait_for_previous(PDL)
    for chunk in tl.range(split * share, tl.minimum((split + 1) * share, chunks), num_stages=STAGES):
        word = tl.load(weights + chunk * 32)
        acc = chunk_products(
            acc, word, xs, chunk, lane, inputs, scale_ptr, zero_ptr, known, groups, stride, EVEN, UNPACK, KIND, GROUP,
            ZEROS, TILE_OUTPUTS, ROWS,
        )  # fmt: skip
    acc = times_factors(acc, factor_ptr, known[:, None], (output < outputs)[:, None], KIND)
    mask = (output < outputs)[:, None] & (row < rows)[None, :]
    offset = row.to(tl.int64)[None, :] * outputs + output[:, None]
    last = True
    if SPLIT:
        acc, last = sum_of_splits(
            acc, partial_ptr, offset, mask, counters_ptr + tile, split, splits, rows, outputs
        )
    if last:
        if BIAS:
            bias = tl.load(bias_ptr + output, mask=output < outputs, other=0.0)
            acc += bias.to(tl.float32)[:, None]
        tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
