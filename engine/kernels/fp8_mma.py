"""Linear layers of a few rows with fp8 weights and fp8 rows, on tensor cores.

They are memory-bound. As in :mod:`engine.kernels.int4_mma` a thread loads its part of the weight straight into
the registers that the product takes its operand from, and the warps of a program share the inputs of its outputs.
Hopper has no instruction for fp8 operands in registers, so pairs of numbers are converted to fp16, exactly; sums
are exact to float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from engine.kernels.activation import activate
from engine.kernels.int4_mma import sum_of_parts
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.registers import interleaved

#: Most rows. 16 are loaded faster by programs that have them in shared memory, as those of skinny_gemm.py do.
MAX_ROWS = 1
#: Bytes of a share; inputs are a multiple.
WIDTH = 64
_wait_for_previous = gluon.jit(wait_for_previous.fn)
_activate = gluon.jit(activate.fn)


@dataclass(frozen=True, slots=True)
class Fp8Tile:
    """How a program multiplies.

    Attributes:
        height: of its left operand; a multiple of 16.
        parts: consecutive shares of a row of the weight that are rows of it, see
            :class:`~engine.kernels.int4_mma.Int4Tile`.
        warps: that share the inputs.
        depth: shares of each part that a warp has loaded in advance.
    """

    height: int
    parts: int
    warps: int
    depth: int


def choose_tile(inputs: int) -> Fp8Tile:
    """Choose the tile of a problem. Of 22 tiles it is the best on an H200, or within 3 % of it, for one row and
    the layers of a model of 7 billion parameters."""
    # With many inputs the programs are few.
    return Fp8Tile(16, 4, 4, 4) if inputs > 8192 else Fp8Tile(32, 4, 2, 4)


def fp8_mma_gluon(x, weight, bias=None, *, activation=None, scale, row_scale, dtype):
    """See :func:`engine.kernels.skinny_gemm.skinny_gemm_triton`; for at most :data:`MAX_ROWS` rows in fp8."""
    (rows, inputs), weights = x.shape, len(weight)
    gated = activation is not None
    outputs = weights // 2 if gated else weights
    assert 0 < rows <= MAX_ROWS and weight.shape[1] == inputs and inputs % WIDTH == 0
    assert x.is_contiguous() and weight.is_contiguous() and scale.values.shape == (weights, 1)
    out = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    tile = choose_tile(inputs)
    tile_outputs = tile.height // tile.parts // (2 if gated else 1)
    launch(
        _fp8_mma_kernel, (triton.cdiv(outputs, tile_outputs),),
        # Words of four numbers: narrower ones would be taken apart when they arrive, and waited for.
        x_ptr=x.view(torch.int32), row_scale_ptr=row_scale, weight_ptr=weight.view(torch.int32),
        scale_ptr=scale.values, bias_ptr=x if bias is None else bias, out_ptr=out, rows=rows, outputs=outputs,
        words=inputs // 4, COLUMNS=max(8, triton.next_power_of_2(rows * tile.parts)), TILE=tile.height,
        PARTS=tile.parts, OUTPUTS=tile_outputs, WIDTH=WIDTH // 4, WARPS=tile.warps, DEPTH=tile.depth,
        BIAS=bias is not None, ACTIVATION=activation or "", num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return out


@gluon.jit
def _halves(words, LAYOUT: gl.constexpr, AXIS: gl.constexpr):
    """Convert words of four fp8 numbers along ``AXIS`` to fp16: the first two of each, and the others, in LAYOUT."""
    a, b, c, d = gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 first, second;
        mov.b32 {low, high}, $4;
        cvt.rn.f16x2.e4m3x2 first, low;
        cvt.rn.f16x2.e4m3x2 second, high;
        mov.b32 {$0, $1}, first;
        mov.b32 {$2, $3}, second;
        }""",
        "=h,=h,=h,=h,r", [words], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
    )  # fmt: skip
    return interleaved(a, b, LAYOUT, AXIS), interleaved(c, d, LAYOUT, AXIS)


@gluon.jit
def _load_words(source, share, first, words):
    """Load each part's share from ``first`` on; zeros beyond the last word. Each is read once: L1 keeps the rows."""
    return gl.load(source + first, mask=share + first < words, other=0, cache_modifier=".cg")


@gluon.jit(do_not_specialize=["rows"])
def _fp8_mma_kernel(
    x_ptr, row_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, rows, outputs, words,
    COLUMNS: gl.constexpr, TILE: gl.constexpr, PARTS: gl.constexpr, OUTPUTS: gl.constexpr, WIDTH: gl.constexpr,
    WARPS: gl.constexpr, DEPTH: gl.constexpr, BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program per tile of outputs; PARTS consecutive shares of WIDTH words are rows of the left operand.

    With an activation the first half of a tile's rows of the weight are gates, the others are their factors.
    Tensors have dimensions of warps, parts of rows of the weight, words or inputs, and parts of rows.
    """
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    WORDS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    INPUTS: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    X_WORDS: gl.constexpr = gl.DotOperandLayout(1, SUMS, 4)
    # Rows of the weight of a tile; words that the program's warps multiply at a time.
    HEIGHT: gl.constexpr = TILE // PARTS
    STEP: gl.constexpr = WARPS * PARTS * WIDTH
    tile = gl.program_id(0) * OUTPUTS

    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None]
    part = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None]
    # Lanes beyond the last output load the last one again; their results are not stored.
    weight = _weight_of(tile, part // PARTS, outputs, OUTPUTS).to(gl.int64)
    lane = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    share = (warp * PARTS + part % PARTS) * WIDTH
    source = weight_ptr + weight * words + (share + lane)

    x_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, X_WORDS)))[:, None, None]
    x_lane = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, X_WORDS)))[None, :, None]
    x_part = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, X_WORDS)))[None, None, :]
    x_share = (x_warp * PARTS + x_part % PARTS) * WIDTH
    x_source = x_ptr + x_part // PARTS * words + (x_share + x_lane)

    # The first words are loaded before the previous kernel has written x. A slot is filled again as soon as it has
    # been used, and into the same registers: numbers that were moved would be waited for.
    slots = ()
    for slot in gl.static_range(DEPTH):
        slots = slots + (_load_words(source, share, slot * STEP, words),)
    sums = gl.zeros([WARPS, TILE, COLUMNS], gl.float32, SUMS)
    _wait_for_previous(PDL)
    for begin in range(0, words, DEPTH * STEP):
        for slot in gl.static_range(DEPTH):
            first = begin + slot * STEP
            known = (x_share + first < words) & (x_part // PARTS < rows)
            x = _halves(gl.load(x_source + first, mask=known, other=0), INPUTS, 1)
            numbers = _halves(slots[0], WEIGHTS, 2)
            sums = mma_v2(numbers[0], x[0], sums)
            sums = mma_v2(numbers[1], x[1], sums)
            slots = slots[1:] + (_load_words(source, share, first + DEPTH * STEP, words),)

    RESULT: gl.constexpr = gl.SliceLayout(0, SUMS)
    result = sum_of_parts(gl.sum(sums, axis=0), RESULT, PARTS)
    place = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, RESULT))[:, None]
    row = gl.arange(0, COLUMNS // PARTS, layout=gl.SliceLayout(0, RESULT))[None, :]
    weight = _weight_of(tile, place, outputs, OUTPUTS)
    result *= gl.load(scale_ptr + weight) * gl.load(row_scale_ptr + row, mask=row < rows, other=0.0)
    if BIAS:
        result += gl.load(bias_ptr + weight).to(gl.float32)
    if ACTIVATION != "":
        gates = gl.reshape(gl.where(place < OUTPUTS, result, 0.0), [2, OUTPUTS, COLUMNS // PARTS])
        factors = gl.reshape(gl.where(place < OUTPUTS, 0.0, result), [2, OUTPUTS, COLUMNS // PARTS])
        result = _activate(gl.sum(gates, axis=0), ACTIVATION) * gl.sum(factors, axis=0)
        result = gl.convert_layout(result, RESULT)
    output = tile + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, RESULT))[:, None]
    gl.store(
        out_ptr + row * outputs + output, result.to(out_ptr.dtype.element_ty),
        mask=(output < outputs) & (row < rows),
    )  # fmt: skip


@gluon.jit
def _weight_of(tile, place, outputs, OUTPUTS: gl.constexpr):
    """The row of the weight at each place of a tile: gates, then their factors; the last output beyond it."""
    return gl.minimum(tile + place % OUTPUTS, outputs - 1) + place // OUTPUTS * outputs
