"""Linear layers of a few rows with fp8 weights and fp8 rows, on tensor cores.

They are memory-bound. As in :mod:`engine.kernels.int4_mma` a thread loads its part of the weight straight into
the registers that the product takes its operand from, and the warps of a program share the inputs of its outputs.
Hopper has no instruction for fp8 operands in registers, so pairs of numbers are converted to fp16, exactly; sums
are exact to float32.

A row of up to :data:`MOST_WHOLE` numbers in bf16 is rounded by each program that multiplies it, as
:func:`engine.kernels.fp8.quantise_rows` does it: that takes less time than a launch. All weights of a program are
loaded by then, those of attention's output while attention runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from engine.kernels.activation import activate
from engine.kernels.fp8 import FP8, scale_of_row
from engine.kernels.int4_mma import sum_of_parts
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.registers import interleaved

#: Most rows. 16 are loaded faster by programs that have them in shared memory, as those of skinny_gemm.py do.
MAX_ROWS = 1
#: Bytes of a share; inputs are a multiple.
WIDTH = 64
#: Most numbers of a row that the kernel rounds.
MOST_WHOLE = 4096
_wait_for_previous = gluon.jit(wait_for_previous.fn)
_activate = gluon.jit(activate.fn)
_scale_of_row = gluon.jit(scale_of_row.fn)


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


def choose_tile(inputs: int, *, rounds: bool = False) -> Fp8Tile:
    """Choose the tile of a problem. Of 22 tiles it is the best on an H200, or within 3 % of it, for one row and
    the layers of a model of 7 billion parameters.

    Args:
        rounds: the kernel rounds the row, so it loads all of it in advance.
    """
    if rounds:
        # Of four the best by the time of whole layers.
        return Fp8Tile(32, 4, 2, 7) if inputs <= 7 * 2 * 4 * WIDTH else Fp8Tile(32, 4, 4, 4)
    # With many inputs the programs are few.
    return Fp8Tile(16, 4, 4, 4) if inputs > 8192 else Fp8Tile(32, 4, 2, 4)


def supports(x: torch.Tensor) -> bool:
    """Return whether the kernel can multiply ``x`` ``(T, K)``, in fp8 or bf16, if the GPU can multiply it in fp8."""
    rows, inputs = x.shape
    whole = inputs <= MOST_WHOLE and x.data_ptr() % 8 == 0
    return rows <= MAX_ROWS and inputs % WIDTH == 0 and (x.dtype == FP8 or whole)


def fp8_mma_gluon(x, weight, bias=None, *, activation=None, scale, row_scale=None, dtype):
    """See :func:`engine.kernels.skinny_gemm.skinny_gemm_triton`; for what :func:`supports` admits.

    Args:
        row_scale: of a row in fp8; None for one in bf16, which the kernel rounds.
    """
    (rows, inputs), weights = x.shape, len(weight)
    rounds = row_scale is None
    # Words of four numbers: narrower ones would be taken apart when they arrive, and waited for.
    words = x.flatten().view(torch.int64 if rounds else torch.int32)
    gated = activation is not None
    outputs = weights // 2 if gated else weights
    assert rows > 0 and supports(x) and weight.shape[1] == inputs
    assert x.dtype == (torch.bfloat16 if rounds else FP8)
    assert x.is_contiguous() and weight.is_contiguous() and scale.values.shape == (weights, 1)
    out = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    tile = choose_tile(inputs, rounds=rounds)
    tile_outputs = tile.height // tile.parts // (2 if gated else 1)
    launch(
        _fp8_mma_kernel, (triton.cdiv(outputs, tile_outputs),),
        x_ptr=words, row_scale_ptr=scale.values if rounds else row_scale, weight_ptr=weight.view(torch.int32),
        scale_ptr=scale.values, bias_ptr=x if bias is None else bias, out_ptr=out, rows=rows, outputs=outputs,
        words=inputs // 4, COLUMNS=max(8, triton.next_power_of_2(rows * tile.parts)), TILE=tile.height,
        PARTS=tile.parts, OUTPUTS=tile_outputs, WIDTH=WIDTH // 4, WARPS=tile.warps, DEPTH=tile.depth,
        BIAS=bias is not None, ACTIVATION=activation or "", ROUND=rounds, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return out


@gluon.jit
def halves_of_words(words, LAYOUT: gl.constexpr, AXIS: gl.constexpr):
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
def _rounded_halves(words, inverse, LAYOUT: gl.constexpr, AXIS: gl.constexpr):
    """Multiply words of four bf16 numbers by ``inverse`` and round them to fp8; then as :func:`halves_of_words`."""
    a, b, c, d = gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 first, second;
        .reg .f32 a, b, c, d;
        mov.b64 {first, second}, $4;
        shl.b32 a, first, 16;
        and.b32 b, first, 0xffff0000;
        shl.b32 c, second, 16;
        and.b32 d, second, 0xffff0000;
        mul.f32 a, a, $5;
        mul.f32 b, b, $5;
        mul.f32 c, c, $5;
        mul.f32 d, d, $5;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a;
        cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        cvt.rn.f16x2.e4m3x2 first, low;
        cvt.rn.f16x2.e4m3x2 second, high;
        mov.b32 {$0, $1}, first;
        mov.b32 {$2, $3}, second;
        }""",
        "=h,=h,=h,=h,l,f", [words, inverse],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
    )  # fmt: skip
    return interleaved(a, b, LAYOUT, AXIS), interleaved(c, d, LAYOUT, AXIS)


@gluon.jit
def _largest(words):
    """The largest magnitude of each word of four bf16 numbers, float32."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 first, second, a, b, c, d;
        mov.b64 {first, second}, $1;
        and.b32 first, first, 0x7fff7fff;
        and.b32 second, second, 0x7fff7fff;
        shl.b32 a, first, 16;
        and.b32 b, first, 0xffff0000;
        shl.b32 c, second, 16;
        and.b32 d, second, 0xffff0000;
        max.f32 a, a, b;
        max.f32 c, c, d;
        max.f32 $0, a, c;
        }""",
        "=f,l", [words], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_words(source, share, first, words):
    """Load each part's share from ``first`` on; zeros beyond the last word. Each is read once: L1 keeps the rows."""
    return gl.load(source + first, mask=share + first < words, other=0, cache_modifier=".cg")


@gluon.jit(do_not_specialize=["rows"])
def _fp8_mma_kernel(
    x_ptr, row_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, rows, outputs, words,
    COLUMNS: gl.constexpr, TILE: gl.constexpr, PARTS: gl.constexpr, OUTPUTS: gl.constexpr, WIDTH: gl.constexpr,
    WARPS: gl.constexpr, DEPTH: gl.constexpr, BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr, ROUND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program per tile of outputs; PARTS consecutive shares of WIDTH words are rows of the left operand.

    With an activation the first half of a tile's rows of the weight are gates, the others are their factors.
    Tensors have dimensions of warps, parts of rows of the weight, words or inputs, and parts of rows.

    Args:
        x_ptr: words of four numbers in fp8; with ROUND of one row in bf16, of which DEPTH steps are all.
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
    RESULT: gl.constexpr = gl.SliceLayout(0, SUMS)
    place = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, RESULT))[:, None]
    row = gl.arange(0, COLUMNS // PARTS, layout=gl.SliceLayout(0, RESULT))[None, :]
    weight = _weight_of(tile, place, outputs, OUTPUTS)
    # Scales and biases before the PDL wait: see skinny_gemm.py.
    scale = gl.load(scale_ptr + weight)
    if BIAS:
        bias = gl.load(bias_ptr + weight)
    sums = gl.zeros([WARPS, TILE, COLUMNS], gl.float32, SUMS)
    _wait_for_previous(PDL)
    if ROUND:
        whole = ()
        largest = gl.zeros([WARPS, WIDTH, COLUMNS], gl.float32, X_WORDS)
        for slot in gl.static_range(DEPTH):
            known = (x_share + slot * STEP < words) & (x_part // PARTS < rows)
            whole = whole + (gl.load(x_source + slot * STEP, mask=known, other=0),)
        for slot in gl.static_range(DEPTH):
            largest = gl.maximum(largest, _largest(whole[slot]))
        row_scale = _scale_of_row(gl.max(gl.max(gl.max(largest, axis=2), axis=1), axis=0))
        inverse = gl.zeros([WARPS, WIDTH, COLUMNS], gl.float32, X_WORDS) + 1.0 / row_scale
    else:
        row_scale = gl.load(row_scale_ptr + row, mask=row < rows, other=0.0)
    for begin in range(0, words, DEPTH * STEP):
        for slot in gl.static_range(DEPTH):
            first = begin + slot * STEP
            if ROUND:
                x = _rounded_halves(whole[slot], inverse, INPUTS, 1)
            else:
                known = (x_share + first < words) & (x_part // PARTS < rows)
                x = halves_of_words(gl.load(x_source + first, mask=known, other=0), INPUTS, 1)
            numbers = halves_of_words(slots[0], WEIGHTS, 2)
            sums = mma_v2(numbers[0], x[0], sums)
            sums = mma_v2(numbers[1], x[1], sums)
            slots = slots[1:] + (_load_words(source, share, first + DEPTH * STEP, words),)

    result = sum_of_parts(gl.sum(sums, axis=0), RESULT, PARTS)
    result *= scale * row_scale
    if BIAS:
        result += bias.to(gl.float32)
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
