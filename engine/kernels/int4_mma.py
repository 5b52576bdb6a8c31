"""Linear layers of a few rows with a weight in 4 bits, on tensor cores.

They are memory-bound if the numbers are unpacked fast enough. A warp multiplies 16 outputs by 8 rows, so unpacking
is what takes time: 2.5 instructions a weight, less than the four that fit into the time of reading it on an H200.

* A thread loads 16 bytes of a row of words straight into the registers that the product takes its operand from: no
  exchange between threads, no shared memory, no barrier. The product sums over inputs in whatever order, and the
  rows are loaded in the same order.
* Two numbers are unpacked at a time, see :mod:`engine.kernels.int4_unpack`.
* The warps of a program share the inputs of its outputs and add up their sums at the end.

This needs control over layouts, which Gluon has and Triton's language has not. Gluon has no interpreter, so the
tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from engine.kernels.device import is_hopper
from engine.kernels.int4 import CHUNK, Int4Scale, int4_arguments, times_factors
from engine.kernels.int4_unpack import minus_zero, unpacked
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.registers import halves

#: Most rows.
MAX_ROWS = 16
_wait_for_previous = gluon.jit(wait_for_previous.fn)
_times_factors = gluon.jit(times_factors.fn)
_minus_zero = gluon.jit(minus_zero.fn)
_unpacked = gluon.jit(unpacked.fn)


@dataclass(frozen=True, slots=True)
class Int4Tile:
    """How a program multiplies.

    Attributes:
        height: of its left operand; a multiple of 16.
        parts: consecutive chunks of an output that are rows of it. A row of the input is as many columns of the
            right operand, of which there are eight or a multiple; products of different parts are not used.
            Two fill the line of 128 bytes of a load.
        warps: that share the inputs.
        depth: chunks of each part that a warp has loaded in advance.
    """

    height: int
    parts: int
    warps: int
    depth: int


def choose_tile(rows: int, outputs: int, inputs: int, group: int) -> Int4Tile:
    """Choose the tile of a problem. Of some twenty tiles it is the best on an H200, or within 8 % of it, for 1 and 16
    rows and the layers of a model of 7 billion parameters in groups of 128 with zero points."""
    if 0 < group < CHUNK:
        # Scales of several groups take registers.
        return Int4Tile(16, 2, 4, 2) if rows <= 4 else Int4Tile(16, 1, 4, 1)
    if rows <= 2 and inputs > 8192:
        return Int4Tile(32, 4, 2, 3)
    if rows <= 4:
        return Int4Tile(16, 2, 2, 4) if outputs > 8192 else Int4Tile(16, 2, 4, 2)
    if inputs > 8192:
        return Int4Tile(32, 1, 8, 1)
    return Int4Tile(32, 1, 4, 1)


def supports(x: torch.Tensor) -> bool:
    """Return whether the kernel can multiply the rows ``x``: whole chunks of inputs."""
    fits = 0 < x.shape[0] <= MAX_ROWS and x.shape[1] % CHUNK == 0
    return fits and x.element_size() == 2 and is_hopper(x.device)


def int4_mma_gluon(
    x: torch.Tensor, words: torch.Tensor, scale: Int4Scale, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.linear`; for what :func:`supports` admits, without an activation."""
    (rows, inputs), outputs = x.shape, len(words)
    assert 0 < rows <= MAX_ROWS and inputs == scale.inputs and inputs % CHUNK == 0 and x.stride(1) == 1
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    arguments = int4_arguments(words, scale)
    tile = choose_tile(rows, outputs, inputs, arguments["GROUP"])
    # Pairs of words: numbers of 16 bits would be taken apart when they arrive, and the program would wait for that.
    arguments |= {"weight_ptr": words.view(torch.int32), "words": words.shape[1] // 2}
    launch(
        _int4_mma_kernel, (triton.cdiv(outputs, tile.height // tile.parts),),
        x_ptr=x, bias_ptr=x if bias is None else bias, out_ptr=out, rows=rows, outputs=outputs,
        x_stride=x.stride(0), **arguments, COLUMNS=max(8, triton.next_power_of_2(rows * tile.parts)),
        TILE=tile.height, PARTS=tile.parts, WARPS=tile.warps, DEPTH=tile.depth,
        BIAS=bias is not None, num_warps=tile.warps,
        **pdl_options(x),
    )  # fmt: skip
    return out


@gluon.jit
def _load_bits(source):
    """Load the bits of numbers into 32 bits each. The compiler would pair narrower ones as they arrive."""
    if source.dtype.element_ty.primitive_bitwidth == 32:
        values = gl.load(source).to(gl.int32, bitcast=True)
    elif source.dtype.element_ty.primitive_bitwidth == 8:
        values = gl.inline_asm_elementwise(
            "ld.global.nc.u8 $0, [$1];", "=r,l", [source], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        values = gl.inline_asm_elementwise(
            "ld.global.nc.u16 $0, [$1];", "=r,l", [source], dtype=gl.int32, is_pure=True, pack=1
        )
    return values


@gluon.jit
def _exact(scales, DTYPE: gl.constexpr, KIND: gl.constexpr):
    """Return scales in float32, of which ``scales`` are the bits in DTYPE, see :func:`_load_bits`."""
    if KIND == "mxfp4":
        result = (scales << 23).to(gl.float32, bitcast=True)
    elif KIND == "nvfp4":
        result = scales.to(gl.int8).to(gl.float8e4nv, bitcast=True).to(gl.float32)
    elif DTYPE == gl.float32:
        result = scales.to(gl.float32, bitcast=True)
    else:
        result = scales.to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
    return result


@gluon.jit
def _group_of(chunk, k: gl.constexpr, groups, GROUP: gl.constexpr):
    """Group of input ``k`` of a chunk. Groups beyond the last input have no numbers."""
    if GROUP == 0:
        return chunk * 0
    return gl.minimum((chunk * 128 + k) // GROUP, groups - 1)


@gluon.jit
def _load_words(source, chunk, chunks):
    """Load each part's chunk, two words as one; zeros beyond the last chunk. Each is read once: L1 keeps the rows."""
    return gl.load(source + chunk * 16, mask=chunk < chunks, other=0, cache_modifier=".cg")


@gluon.jit
def _load_groups(source, chunk, groups, stride, GROUP: gl.constexpr):
    """Load a value of each group of a chunk."""
    values = (_load_bits(source + _group_of(chunk, 0, groups, GROUP) * stride),)
    if 0 < GROUP and GROUP < 128:
        for k in gl.static_range(GROUP, 128, GROUP):
            values = values + (_load_bits(source + _group_of(chunk, k, groups, GROUP) * stride),)
    return values


@gluon.jit(do_not_specialize=["rows", "groups"])
def _int4_mma_kernel(
    x_ptr, bias_ptr, out_ptr, rows, outputs, x_stride,
    weight_ptr, scale_ptr, zero_ptr, factor_ptr, inputs, words, groups, stride, KIND: gl.constexpr,
    GROUP: gl.constexpr, ZEROS: gl.constexpr, COLUMNS: gl.constexpr, TILE: gl.constexpr, PARTS: gl.constexpr,
    WARPS: gl.constexpr, DEPTH: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program per ``TILE / PARTS`` outputs. PARTS consecutive chunks of an output are rows of the left operand.

    Tensors have dimensions of warps, parts of outputs, inputs of a number of each word, and parts of rows.
    """
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    # A thread has eight consecutive words, and the eight inputs of one number of each.
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    PAIRS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    INPUTS: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    OUTPUTS: gl.constexpr = TILE // PARTS
    ROWS: gl.constexpr = COLUMNS // PARTS
    # Chunks that the program's warps multiply at a time.
    STEP: gl.constexpr = WARPS * PARTS
    tile = gl.program_id(0) * OUTPUTS
    chunks = words // 16

    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, PAIRS)))[:, None, None]
    part = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, PAIRS)))[None, :, None]
    # Lanes beyond the last output load the last one again; their results are not stored.
    output = gl.minimum(tile + part // PARTS, outputs - 1).to(gl.int64)
    lane = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, PAIRS)))[None, None, :]
    source, chunk = weight_ptr + output * words + lane, warp * PARTS + part % PARTS

    zero_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, WEIGHTS)))[:, None, None]
    zero_part = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, WEIGHTS)))[None, :, None]
    zero_source = zero_ptr + gl.minimum(tile + zero_part // PARTS, outputs - 1)
    zero_chunk = zero_warp * PARTS + zero_part % PARTS

    x_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, INPUTS)))[:, None, None]
    x_lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, INPUTS)))[None, :, None]
    x_part = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, INPUTS)))[None, None, :]
    x_row, x_chunk = x_part // PARTS, x_warp * PARTS + x_part % PARTS
    x_source = x_ptr + x_row * x_stride + (x_chunk * 128 + x_lane)

    scale_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None]
    scale_part = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))[None, :, None]
    scale_source = scale_ptr + gl.minimum(tile + scale_part // PARTS, outputs - 1)
    scale_chunk = scale_warp * PARTS + scale_part % PARTS

    # Numbers of a word that are of one group; groups that the 32 inputs of a number of each word are of.
    SPAN: gl.constexpr = 4 if GROUP == 0 or GROUP >= 128 else (GROUP // 32 if GROUP >= 32 else 1)
    HALVES: gl.constexpr = 2 if GROUP == 16 else 1
    # The first words are loaded before the previous kernel has written x. A slot is filled again as soon as it has
    # been used, and into the same registers: numbers that were moved would be waited for.
    no_zeros = gl.full([WARPS, TILE, 1], 8, gl.int32, WEIGHTS)
    pairs = ()
    scales = ()
    zeros = ()
    for slot in gl.static_range(DEPTH):
        pairs = pairs + (_load_words(source, slot * STEP + chunk, chunks),)
        scales = scales + (_load_groups(scale_source, slot * STEP + scale_chunk, groups, stride, GROUP),)
        if ZEROS:
            zeros = zeros + (_load_groups(zero_source, slot * STEP + zero_chunk, groups, stride, GROUP),)
    sums = gl.zeros([WARPS, TILE, COLUMNS], gl.float32, SUMS)
    _wait_for_previous(PDL)
    for begin in range(0, chunks, DEPTH * STEP):
        for slot in gl.static_range(DEPTH):
            first = begin + slot * STEP
            word = halves(pairs[0], WEIGHTS, 2)
            products = gl.zeros([WARPS, TILE, COLUMNS], gl.float32, SUMS)
            for start in gl.static_range(0, 4, SPAN):
                for half in gl.static_range(HALVES):
                    zero = zeros[0][start // SPAN * HALVES + half] if ZEROS else no_zeros
                    for i in gl.static_range(start, start + SPAN):
                        k = first * 128 + i * 32
                        known = (x_chunk + first < chunks) & (x_row < rows)
                        if HALVES == 2:
                            known = known & (x_lane // 16 == half)
                        x = gl.load(x_source + k, mask=known, other=0.0)
                        number = _unpacked(word, _minus_zero(zero, DTYPE), i, KIND, DTYPE)
                        products = mma_v2(number, x, products)
                    if GROUP != 0:
                        scale = scales[0][start // SPAN * HALVES + half]
                        sums += products * _exact(scale, scale_ptr.dtype.element_ty, KIND)
                        products = gl.zeros([WARPS, TILE, COLUMNS], gl.float32, SUMS)
            if GROUP == 0:
                sums += products
            next_chunk = first + DEPTH * STEP
            pairs = pairs[1:] + (_load_words(source, next_chunk + chunk, chunks),)
            if GROUP != 0:
                loaded = _load_groups(scale_source, next_chunk + scale_chunk, groups, stride, GROUP)
                scales = scales[1:] + (loaded,)
            if ZEROS and GROUP != 0:
                loaded = _load_groups(zero_source, next_chunk + zero_chunk, groups, stride, GROUP)
                zeros = zeros[1:] + (loaded,)
            elif ZEROS:
                zeros = zeros[1:] + (zeros[0],)
    RESULT: gl.constexpr = gl.SliceLayout(0, SUMS)
    result = sum_of_parts(gl.sum(sums, axis=0), RESULT, PARTS)
    output = tile + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, RESULT))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, RESULT))[None, :]
    known = output < outputs
    result = _times_factors(result, factor_ptr, output, known, KIND)
    if GROUP == 0:
        scale = _load_bits(scale_ptr + gl.minimum(output, outputs - 1))
        result *= _exact(scale, scale_ptr.dtype.element_ty, KIND)
    if BIAS:
        result += gl.load(bias_ptr + output, mask=known, other=0.0).to(gl.float32)
    gl.store(out_ptr + row * outputs + output, result.to(DTYPE), mask=known & (row < rows))


@gluon.jit
def sum_of_parts(sums, LAYOUT: gl.constexpr, PARTS: gl.constexpr):
    """Add up the products of parts of outputs with the same parts of rows, ``(N * PARTS, T * PARTS)``: ``(N, T)``."""
    if PARTS > 1:
        N: gl.constexpr = sums.shape[0]
        T: gl.constexpr = sums.shape[1]
        of_output = gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))[:, None] % PARTS
        of_row = gl.arange(0, T, layout=gl.SliceLayout(0, LAYOUT))[None, :] % PARTS
        sums = gl.reshape(gl.where(of_output == of_row, sums, 0.0), [N // PARTS, PARTS, T // PARTS, PARTS])
        sums = gl.sum(gl.sum(sums, axis=3), axis=1)
    return gl.convert_layout(sums, LAYOUT)
