"""GEMV with a weight in 4 bits: a linear layer of one input row.

It is memory-bound, see :mod:`engine.kernels.gemv`, if numbers are unpacked fast enough: converting an integer is
too slow for that. A number is put into the mantissa of a float instead, at whatever bits it has in its word, and
what these bits multiply it by is taken from the input. On Hopper GPUs the kernel in
:mod:`engine.kernels.int4_mma` takes fewer instructions yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from engine.kernels.int4 import (
    Int4Scale,
    group_of,
    int4_arguments,
    number_times_power,
    scale_of,
    times_factors,
)
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous


@dataclass(frozen=True, slots=True)
class Int4GemvTile:
    """Outputs per program, words per step, and warps of a program."""

    outputs: int
    words: int
    warps: int


def choose_tile(outputs: int, words: int, *, zeros: bool = False) -> Int4GemvTile:
    """Choose the tile of a problem. A thread has some words of each output, which it loads at once.

    Of some thirty tiles it is the best on an H200 for layers of 3584 to 18944 inputs in groups of 128.

    Args:
        zeros: the weight has zero points.
    """
    if zeros or outputs > 8192:
        tile = Int4GemvTile(outputs=4, words=128, warps=1)
    elif words > 2048:
        tile = Int4GemvTile(outputs=2, words=1024, warps=4)
    else:
        tile = Int4GemvTile(outputs=4 if outputs > 2048 else 2, words=512, warps=2)
    return replace(tile, words=min(tile.words, triton.next_power_of_2(words)))


def int4_gemv_triton(
    x: torch.Tensor, words: torch.Tensor, scale: Int4Scale, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.linear`; for one row, without an activation."""
    outputs = len(words)
    assert x.shape == (1, scale.inputs) and x.stride(1) == 1
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    tile = choose_tile(outputs, words.shape[1], zeros=scale.zeros is not None)
    if scale.kind != "int4":
        # Decoding floats needs registers.
        tile = replace(tile, outputs=2)
    launch(
        _int4_gemv_kernel, (triton.cdiv(outputs, tile.outputs),),
        x_ptr=x, bias_ptr=x if bias is None else bias, out_ptr=out, outputs=outputs,
        **int4_arguments(words, scale), TILE_OUTPUTS=tile.outputs, TILE_WORDS=tile.words,
        BIAS=bias is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return out


@triton.jit
def add_words(
    sums, word, w, known, x_ptr, row, inputs, scale_ptr, zero_ptr, groups, stride, KIND: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """Add the products of words with a row of inputs to ``sums``, ``(TILE_OUTPUTS, TILE_WORDS)`` float32.

    Args:
        word: ``(TILE_OUTPUTS, TILE_WORDS)``.
        w: ``(1, TILE_WORDS)``, their indices in a row of the weight.
        known: where there are words.
        row: ``(TILE_OUTPUTS, 1)`` int64, rows of the scales.
    """
    ZERO: tl.constexpr = 0 if ZEROS else 8
    chunk = w // 32
    k = chunk * 128 + w % 32
    part = tl.zeros([TILE_OUTPUTS, TILE_WORDS], tl.float32)
    total = tl.zeros([1, TILE_WORDS], tl.float32)
    for i in tl.static_range(4):
        x = tl.load(x_ptr + k + i * 32, mask=k + i * 32 < inputs, other=0.0).to(tl.float32)
        number, factor = number_times_power(word, i, ZERO, KIND)
        part += number * (x * factor)
        total += x
        if i == 3 or (GROUP > 0 and (i + 1) * 32 % GROUP == 0):
            # The last number of a group. Groups beyond the last input have no numbers.
            group = tl.minimum(group_of(chunk, w % 32, i, GROUP), groups - 1)
            if ZEROS:
                zero = tl.load(zero_ptr + row + group * stride, mask=known, other=0)
                part -= zero.to(tl.float32) * total
            scale = scale_of(tl.load(scale_ptr + row + group * stride, mask=known, other=0), KIND)
            sums += part * scale
            part = tl.zeros([TILE_OUTPUTS, TILE_WORDS], tl.float32)
            total = tl.zeros([1, TILE_WORDS], tl.float32)
    return sums


@triton.jit(do_not_specialize=["groups"])
def _int4_gemv_kernel(
    x_ptr, bias_ptr, out_ptr, outputs, weight_ptr, scale_ptr, zero_ptr, factor_ptr, inputs, words, groups, stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_WORDS: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of outputs; see :func:`~engine.kernels.int4.int4_arguments`."""
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row_mask = (output < outputs)[:, None]
    lane = tl.arange(0, TILE_WORDS)[None, :]
    row = output.to(tl.int64)[:, None]
    weights = weight_ptr + row * words
    sums = tl.zeros([TILE_OUTPUTS, TILE_WORDS], tl.float32)
    # Prefetch each tile of weights during the step before, the first one before the previous kernel has
    # written x.
    next_word = tl.load(weights + lane, mask=row_mask & (lane < words), other=0)
    wait_for_previous(PDL)
    for first in range(0, words, TILE_WORDS):
        word = next_word
        w = first + lane
        next_lane = w + TILE_WORDS
        next_word = tl.load(weights + next_lane, mask=row_mask & (next_lane < words), other=0)
        sums = add_words(
            sums, word, w, row_mask & (w < words), x_ptr, row, inputs, scale_ptr, zero_ptr, groups, stride, KIND,
            GROUP, ZEROS, TILE_OUTPUTS, TILE_WORDS,
        )  # fmt: skip
    result = times_factors(tl.sum(sums, axis=1), factor_ptr, output, output < outputs, KIND)
    if BIAS:
        result += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=output < outputs)
