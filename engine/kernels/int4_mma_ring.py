"""Linear layers of up to eight rows with a weight of integers in 4 bits, on tensor cores.

Like :mod:`engine.kernels.int4_mma`, from which it differs in what it needs fewer instructions and less waiting for:

* Words, scales and zero points are copied to a ring of buffers in shared memory, several steps in advance, whatever
  registers are left. A thread copies the words that it loads from there.
* The inputs of a step are loaded during the step before.
* A shift and one logical instruction make a number of each of two words one between 16 and 31. What 16 and the zero
  point add to the products, a multiple of the sum of the inputs, is taken away from the sums of a group. A product with
  ones sums the inputs, and all outputs of a program share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from engine.kernels.device import is_hopper, num_sms
from engine.kernels.int4 import CHUNK, Int4Scale
from engine.kernels.int4_mma import sum_of_parts
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.registers import halves
from engine.kernels.ring import copy_load

_wait_for_previous = gluon.jit(wait_for_previous.fn)

#: Most rows, with more outputs than :data:`_MANY` and with fewer, see :func:`most_rows`.
MAX_ROWS, _FEW = 8, 4
_MANY = 1 << 15


@dataclass(frozen=True, slots=True)
class RingTile:
    """How a program multiplies.

    Attributes:
        height: of the left operand of a warp; a multiple of 16.
        parts: consecutive chunks of an output that are rows of it, see :class:`~engine.kernels.int4_mma.Int4Tile`.
        warps: that share the inputs.
        depth: steps in the ring.
    """

    height: int
    parts: int
    warps: int
    depth: int


def choose_tile(rows: int, outputs: int, inputs: int, sms: int) -> RingTile:
    """Choose the tile of a problem. Of 5 to 24 tiles it is the best on an H200, or within 4 % of the best, for 1, 2, 4
    and 8 rows and layers of models of 7 to 72 billion parameters in groups of 128 with zero points."""
    # Of the right operand's eight columns each part has as many as there are rows.
    parts = 4 if rows <= 2 else 2 if rows <= _FEW else 1
    if rows > _FEW or outputs > _MANY:
        return RingTile(32, parts, 4 // parts, 3)
    # With fewer outputs all programs run at once, as many warps as registers allow: an SM holds four programs of four
    # warps with operands of 32 rows and five with operands of 16, or eight and eleven of two warps.
    if inputs > 8192 and 16 * sms < outputs <= 32 * sms:
        return RingTile(32, 8, 2, 3) if rows == 1 else RingTile(32, parts, 4, 3)
    if inputs < 4096 or outputs > 64 * sms:
        return RingTile(16, 2, 2, 3)
    return RingTile(16, 2, 4, 3) if outputs <= 40 * sms else RingTile(32, parts, 8 // parts, 3)


def most_rows(outputs: int) -> int:
    """Return the most rows for which the kernel is the fastest."""
    return MAX_ROWS if outputs > _MANY else _FEW


def supports(x: torch.Tensor, scale: Int4Scale) -> bool:
    """Return whether the kernel can multiply the rows ``x`` by a weight with these scales."""
    fits = (
        0 < x.shape[0] <= most_rows(len(scale.values)) and x.shape[1] % CHUNK == 0 and x.element_size() == 2
    )
    # Inputs are loaded by 16 bytes.
    aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return fits and aligned and scale.pairs is not None and is_hopper(x.device)


def int4_mma_ring_gluon(
    x: torch.Tensor, words: torch.Tensor, scale: Int4Scale, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.linear`; for what :func:`supports` admits, without an activation."""
    (rows, inputs), outputs, chunks = x.shape, len(words), x.shape[1] // CHUNK
    assert scale.pairs is not None and inputs == scale.inputs and inputs % CHUNK == 0
    assert 0 < rows <= MAX_ROWS and x.stride(1) == 1 and x.stride(0) % 8 == 0 and words.is_contiguous()
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    tile = choose_tile(rows, outputs, inputs, num_sms(x.device))
    launch(
        _int4_mma_ring_kernel, (triton.cdiv(outputs, tile.height // tile.parts),),
        # Two numbers of 16 bits as one: narrower ones would be taken apart when they arrive, and waited for.
        x_ptr=x.view(torch.int32), bias_ptr=x if bias is None else bias, out_ptr=out, rows=rows, outputs=outputs,
        x_stride=x.stride(0) // 8, weight_ptr=words.view(torch.int32), pairs_ptr=scale.pairs, chunks=chunks,
        SPAN=0 if len(scale.pairs) == 1 else scale.group // CHUNK,
        COLUMNS=max(8, triton.next_power_of_2(rows * tile.parts)), TILE=tile.height, PARTS=tile.parts,
        WARPS=tile.warps, DEPTH=tile.depth, EVEN=chunks % (tile.warps * tile.parts) == 0,
        FP16=scale.values.dtype == torch.float16, BIAS=bias is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return out


def _numbers_asm(shifts: tuple[int, ...], mask: str, base: str) -> str:
    """Assembly that makes ``$0`` to ``$3`` the numbers of two words, plus 16.

    Args:
        shifts: to the left, which put a number into the highest bits of the mantissas but for unused ones.
        mask: of these bits.
        base: 16, twice.
    """
    lines = [".reg .b32 shifted;"]
    for i, shift in enumerate(shifts):
        lines.append(f"{'shl.b32' if shift > 0 else 'shr.u32'} shifted, $4, {abs(shift)};")
        lines.append(f"lop3.b32 ${i}, shifted, {mask}, {base}, 0xEA;")
    return "{ " + " ".join(lines) + " }"


_NUMBERS_BF16 = gl.constexpr(_numbers_asm((3, -1, -5, -9), "0x00780078", "0x41804180"))
_NUMBERS_FP16 = gl.constexpr(_numbers_asm((6, 2, -2, -6), "0x03C003C0", "0x4C004C00"))


@gluon.jit
def _numbers(words, DTYPE: gl.constexpr):
    """Return the four numbers of each word plus 16, in DTYPE."""
    if DTYPE == gl.bfloat16:
        numbers = gl.inline_asm_elementwise(
            _NUMBERS_BF16, "=&r,=&r,=&r,=&r,r", [words],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        numbers = gl.inline_asm_elementwise(
            _NUMBERS_FP16, "=&r,=&r,=&r,=&r,r", [words],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return numbers


@gluon.jit
def _repeated(sums, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Repeat 16 rows, which are equal, for each of TILE; no instruction is needed for that."""
    TIMES: gl.constexpr = TILE // 16
    if TIMES == 1:
        rows = sums
    else:
        rows = gl.permute(gl.join(sums, sums), (0, 3, 1, 2))
        rows = gl.convert_layout(
            gl.reshape(rows, [sums.shape[0], TILE, sums.shape[2]]), LAYOUT, assert_trivial=True
        )
    return rows


@gluon.jit
def _copy_step(
    words, pairs, slot, source, chunk, pairs_source, pairs_chunk, first, chunks, outputs, SPAN: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """Start to copy a step's words, and the scales and zero points of their groups; zeros beyond the last step."""
    part, pairs_part = chunk + first, pairs_chunk + first
    if not EVEN:
        # Parts beyond the last chunk load that again; the inputs that they are multiplied by are 0.
        part, pairs_part = gl.minimum(part, chunks - 1), gl.minimum(pairs_part, chunks - 1)
    copy_load(words.index(slot), source + part * 16, mask=chunk * 0 + first < chunks, cache_modifier=".cg")
    group = pairs_part * 0 if SPAN == 0 else pairs_part // SPAN
    copy_load(pairs.index(slot), pairs_source + group * outputs, mask=pairs_chunk * 0 + first < chunks)
    async_copy.commit_group()


@gluon.jit
def _load_inputs(source, known, chunk, first, chunks, EVEN: gl.constexpr):
    """Load the inputs of the four numbers of a step's words, two as one; zeros beyond the last chunk."""
    if EVEN:
        seen = known & (chunk * 0 + first < chunks)
    else:
        seen = known & (chunk + first < chunks)
    inputs = ()
    for i in gl.static_range(4):
        inputs = inputs + (gl.load(source + (first * 64 + i * 16), mask=seen, other=0),)
    return inputs


@gluon.jit(do_not_specialize=["rows"])
def _int4_mma_ring_kernel(
    x_ptr, bias_ptr, out_ptr, rows, outputs, x_stride, weight_ptr, pairs_ptr, chunks, SPAN: gl.constexpr,
    COLUMNS: gl.constexpr, TILE: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, DEPTH: gl.constexpr,
    EVEN: gl.constexpr, FP16: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program per ``TILE / PARTS`` outputs. PARTS consecutive chunks of an output are rows of the left operand.

    Tensors have dimensions of warps, parts of outputs, inputs of a number of each word, and parts of rows.

    Args:
        x_stride: of rows, in eights of numbers.
        weight_ptr: ``(outputs, 16 * chunks)`` int32, two words as one.
        pairs_ptr: see :class:`~engine.kernels.int4.Int4Scale`.
        SPAN: chunks of a group; 0: all.
        EVEN: all steps are whole.
        FP16: dtype of the scales; otherwise bfloat16.
    """
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    # A thread has eight consecutive words, and the eight inputs of one number of each.
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    PAIRS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    INPUTS: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    X_PAIRS: gl.constexpr = gl.DotOperandLayout(1, SUMS, 4)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    OUTPUTS: gl.constexpr = TILE // PARTS
    # Chunks that the program's warps multiply at a time.
    STEP: gl.constexpr = WARPS * PARTS
    tile = gl.program_id(0) * OUTPUTS

    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, PAIRS)))[:, None, None]
    part = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, PAIRS)))[None, :, None]
    # Lanes beyond the last output load the last one again; their results are not stored.
    output = gl.minimum(tile + part // PARTS, outputs - 1).to(gl.int64)
    lane = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, PAIRS)))[None, None, :]
    source, chunk = weight_ptr + output * (chunks * 16) + lane, warp * PARTS + part % PARTS

    pairs_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, FLAT))[:, None]
    pairs_part = gl.arange(0, TILE, layout=gl.SliceLayout(0, FLAT))[None, :]
    pairs_source = pairs_ptr + gl.minimum(tile + pairs_part // PARTS, outputs - 1)
    pairs_chunk = pairs_warp * PARTS + pairs_part % PARTS

    x_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, X_PAIRS)))[:, None, None]
    x_lane = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, X_PAIRS)))[None, :, None]
    x_part = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, X_PAIRS)))[None, None, :]
    x_row, x_chunk = x_part // PARTS, x_warp * PARTS + x_part % PARTS
    x_source = x_ptr + (x_row * (x_stride * 4) + x_chunk * 64 + x_lane)

    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    words = gl.allocate_shared_memory(gl.int32, [DEPTH, WARPS, TILE, 16], plain)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    pairs = gl.allocate_shared_memory(gl.int32, [DEPTH, WARPS, TILE], flat)
    # The first weights are copied before the previous kernel has written x.
    for slot in gl.static_range(DEPTH - 1):
        _copy_step(
            words,
            pairs,
            slot,
            source,
            chunk,
            pairs_source,
            pairs_chunk,
            slot * STEP,
            chunks,
            outputs,
            SPAN,
            EVEN,
        )
    sums = gl.zeros([WARPS, TILE, COLUMNS], gl.float32, SUMS)
    ones = gl.full([WARPS, 16, 32], 1.0, DTYPE, WEIGHTS)
    _wait_for_previous(PDL)
    following = _load_inputs(x_source, x_row < rows, x_chunk, 0, chunks, EVEN)
    slot = 0
    for first in range(0, chunks, STEP):
        inputs = following
        following = _load_inputs(x_source, x_row < rows, x_chunk, first + STEP, chunks, EVEN)
        async_copy.wait_group(DEPTH - 2)
        word = words.index(slot).load(PAIRS)
        pair = gl.expand_dims(pairs.index(slot).load(gl.SliceLayout(2, SUMS)), 2)
        # The slot that was read a step before.
        ahead, last = gl.where(slot == 0, DEPTH - 1, slot - 1), first + (DEPTH - 1) * STEP
        _copy_step(
            words, pairs, ahead, source, chunk, pairs_source, pairs_chunk, last, chunks, outputs, SPAN, EVEN
        )
        slot = gl.where(slot + 1 == DEPTH, 0, slot + 1)
        numbers = _numbers(halves(word, WEIGHTS, 2), DTYPE)
        products = gl.zeros([WARPS, TILE, COLUMNS], gl.float32, SUMS)
        totals = gl.zeros([WARPS, 16, COLUMNS], gl.float32, SUMS)
        for i in gl.static_range(4):
            x = halves(inputs[i], INPUTS, 1).to(DTYPE, bitcast=True)
            products = mma_v2(numbers[i], x, products)
            totals = mma_v2(ones, x, totals)
        if FP16:
            scale = pair.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        else:
            scale = (pair << 16).to(gl.float32, bitcast=True)
        # The bits of -16, with the zero point in the highest ones of the mantissa: one sixteenth each.
        minus = ((pair >> 16 << 19) | (0xC1800000 - (1 << 32))).to(gl.float32, bitcast=True)
        sums += scale * (products + minus * _repeated(totals, TILE, SUMS))
    # Copies beyond the last step write zeros, where the sums of warps will be.
    async_copy.wait_group(0)
    RESULT: gl.constexpr = gl.SliceLayout(0, SUMS)
    result = sum_of_parts(gl.sum(sums, axis=0), RESULT, PARTS)
    output = tile + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, RESULT))[:, None]
    row = gl.arange(0, COLUMNS // PARTS, layout=gl.SliceLayout(0, RESULT))[None, :]
    known = output < outputs
    if BIAS:
        result += gl.load(bias_ptr + output, mask=known, other=0.0).to(gl.float32)
    gl.store(out_ptr + row * outputs + output, result.to(DTYPE), mask=known & (row < rows))
