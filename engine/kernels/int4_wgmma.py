"""Linear layers of some rows with a weight of integers in 4 bits, on the tensor cores of Hopper GPUs.

As in :mod:`engine.kernels.int4_gemm` a tile of weights is the left operand. Words and rows are copied to a ring of
buffers in shared memory, several chunks of inputs in advance. A chunk's words are loaded into the registers that the
product takes its left operand from, and unpacked there, see :mod:`engine.kernels.int4_unpack`; the right operand, the
rows, stays in shared memory. Less its zero point a number is exact, so the scale multiplies the sums, in float32. Where
the layer has too few outputs to fill the GPU, several programs share a tile's inputs (split-K), and the last one to
finish adds up their partial sums.

This needs control over layouts, which Gluon has and Triton's language has not. Gluon has no interpreter, so the
tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.device import MEMORY_BOUND_ROWS, is_hopper, num_sms
from engine.kernels.int4 import CHUNK, Int4Scale
from engine.kernels.int4_unpack import minus_zero, unpacked
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.registers import halves
from engine.kernels.ring import block_barrier, copy_load

_wait_for_previous = gluon.jit(wait_for_previous.fn)
_minus_zero = gluon.jit(minus_zero.fn)
_unpacked = gluon.jit(unpacked.fn)


#: Most rows.
MAX_ROWS = 256
#: Rows of a tile, where reading the weight takes longest.
_HEIGHTS = (8, 16, MEMORY_BOUND_ROWS)
#: A split has at least this many chunks.
_MIN_SPLIT_CHUNKS = 9


@dataclass(frozen=True, slots=True)
class WgmmaTile:
    """How a program multiplies.

    Attributes:
        outputs: of the tile, 64 or a multiple; a warp has 16.
        rows: of the tile.
        depth: chunks of inputs in the ring.
        splits: programs that share the inputs of a tile.
    """

    outputs: int
    rows: int
    depth: int
    splits: int


def choose_tile(rows: int, outputs: int, chunks: int, sms: int) -> WgmmaTile:
    """Choose the tile of a problem. Of about a dozen tiles it is the best on an H200, or within 7 % of the best, for 8
    and 16 rows and layers of models of 2 to 72 billion parameters, and for 64, 128 and 256 rows and those of 7 billion.
    """
    if rows > MEMORY_BOUND_ROWS:
        tiles = triton.cdiv(outputs, 64) * triton.cdiv(rows, 128)
        # A split of few chunks takes longer to be added up than it saves.
        programs = 2 if chunks > 64 else 1
        return WgmmaTile(64, 128, 3, max(1, min(programs * sms // tiles, chunks // _MIN_SPLIT_CHUNKS)))
    # Few heights: a kernel per power of two would make start-up longer.
    height, tiles = next(height for height in _HEIGHTS if rows <= height), triton.cdiv(outputs, 64)
    programs = 3 if rows <= 16 else 2
    splits = max(1, min(programs * sms // tiles, chunks // _MIN_SPLIT_CHUNKS))
    if rows <= 16:
        return WgmmaTile(64, height, 6 if tiles > 4 * sms else 4, splits)
    # With several waves of programs, as many on an SM as fit count for more than depth.
    return WgmmaTile(64, height, 3 if tiles > sms else 4, splits)


def supports(x: torch.Tensor, scale: Int4Scale) -> bool:
    """Return whether the kernel can multiply the rows ``x`` by a weight with these scales."""
    fits = 0 < x.shape[0] <= MAX_ROWS and x.shape[1] % CHUNK == 0 and x.element_size() == 2
    # Rows are copied by 16 bytes.
    aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return fits and aligned and scale.pairs is not None and is_hopper(x.device)


def int4_wgmma_gluon(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: Int4Scale,
    bias: torch.Tensor | None = None,
    *,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.linear`; for what :func:`supports` admits, without an activation.

    Args:
        counters: see :func:`~engine.kernels.skinny_gemm.split_counters`. None: no split-K.
    """
    (rows, inputs), outputs, chunks = x.shape, len(words), x.shape[1] // CHUNK
    assert scale.pairs is not None and inputs == scale.inputs and inputs % CHUNK == 0
    assert 0 < rows <= MAX_ROWS and x.stride(1) == 1 and x.stride(0) % 8 == 0 and words.is_contiguous()
    tile = choose_tile(rows, outputs, chunks, num_sms(x.device))
    tiles, row_tiles = triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, tile.rows)
    splits, warps = 1 if counters is None else tile.splits, tile.outputs // 16
    assert splits == 1 or (
        counters is not None and counters.is_contiguous() and len(counters) >= tiles * row_tiles
    )
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    # Without split-K these are never accessed; any tensor does.
    partial = out if splits == 1 else torch.empty((splits, rows, outputs), device=x.device)
    launch(
        # Programs of the same outputs run at about the same time: they read the same words.
        _int4_wgmma_kernel, (row_tiles, tiles, splits),
        x_ptr=x, bias_ptr=x if bias is None else bias, out_ptr=out, partial_ptr=partial,
        counters_ptr=out if splits == 1 else counters, rows=rows, outputs=outputs, x_stride=x.stride(0) // 8,
        splits=splits, weight_ptr=words.view(torch.int32), pairs_ptr=scale.pairs, chunks=chunks,
        SPAN=0 if len(scale.pairs) == 1 else scale.group // CHUNK, COLUMNS=tile.rows, TILE=tile.outputs,
        WARPS=warps, DEPTH=tile.depth, FP16=scale.values.dtype == torch.float16, SPLIT=splits > 1,
        BIAS=bias is not None, num_warps=warps, **pdl_options(x),
    )  # fmt: skip
    return out


@gluon.jit
def _copy_weights(words, pairs, slot, source, pairs_source, output, chunk, end, outputs, SPAN: gl.constexpr):
    """Start to copy a chunk's words, and the scales and zero points of its group; zeros beyond the last chunk."""
    copy_load(
        words.index(slot), source + chunk * 16, mask=(output >= 0) & (chunk < end), cache_modifier=".cg"
    )
    group = 0 if SPAN == 0 else chunk // SPAN
    copy_load(
        pairs.index(slot),
        pairs_source + group * outputs,
        mask=(pairs_source.to(gl.int64) != 0) & (chunk < end),
    )


@gluon.jit
def _copy_rows(x, slot, source, row, chunk, end):
    """Start to copy the rows of a chunk; zeros beyond the last one."""
    copy_load(x.index(slot), source + chunk * 128, mask=(row >= 0) & (chunk < end))
    async_copy.commit_group()


@gluon.jit
def _beside(first, second, LAYOUT: gl.constexpr):
    """Put numbers after one another along inputs; no instruction is needed for that."""
    both = gl.permute(gl.join(first, second), (0, 2, 1))
    both = gl.reshape(both, [first.shape[0], 2 * first.shape[1]])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit(do_not_specialize=["rows", "splits", "chunks"])
def _int4_wgmma_kernel(
    x_ptr, bias_ptr, out_ptr, partial_ptr, counters_ptr, rows, outputs, x_stride, splits, weight_ptr, pairs_ptr,
    chunks, SPAN: gl.constexpr, COLUMNS: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr, DEPTH: gl.constexpr,
    FP16: gl.constexpr, SPLIT: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program per tile of rows, tile of outputs and split.

    Args:
        x_stride: of rows, in eights.
        partial_ptr: ``(splits, rows, outputs)`` float32, each split's sums.
        counters_ptr: int32, for each tile the splits that have finished.
        weight_ptr: ``(outputs, 16 * chunks)`` int32, two words as one.
        pairs_ptr: see :class:`~engine.kernels.int4.Int4Scale`.
        SPAN: chunks of a group; 0: all.
        FP16: dtype of the scales; otherwise bfloat16.
    """
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    PAIRS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 1)
    # 16 bytes a thread.
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    first_row, tile, split = gl.program_id(0) * COLUMNS, gl.program_id(1) * TILE, gl.program_id(2)
    share = (chunks + splits - 1) // splits
    begin = split * share
    end = gl.minimum(begin + share, chunks)
    # Lanes beyond the last output or row load the last one again; their results are not stored.
    output = gl.minimum(tile + gl.arange(0, TILE, layout=gl.SliceLayout(1, COPY)), outputs - 1).to(gl.int64)[
        :, None
    ]
    source = weight_ptr + output * (chunks * 16) + gl.arange(0, 16, layout=gl.SliceLayout(0, COPY))[None, :]
    pairs_source = pairs_ptr + gl.minimum(tile + gl.arange(0, TILE, layout=FLAT), outputs - 1)
    # The first halves of the chunk's inputs, then the second ones: a line of the swizzled buffer has 64.
    place = gl.arange(0, 2 * COLUMNS, layout=gl.SliceLayout(1, X_COPY))[:, None]
    row = gl.minimum(first_row + place % COLUMNS, rows - 1)
    lane = gl.arange(0, 64, layout=gl.SliceLayout(0, X_COPY))[None, :]
    x_source = x_ptr + row * (x_stride * 8) + (place // COLUMNS * 64 + lane)

    words = gl.allocate_shared_memory(
        gl.int32, [DEPTH, TILE, 16], gl.SwizzledSharedLayout(4, 2, 4, order=[1, 0])
    )
    pairs = gl.allocate_shared_memory(gl.int32, [DEPTH, TILE], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    x = gl.allocate_shared_memory(DTYPE, [DEPTH, 2 * COLUMNS, 64], gl.NVMMASharedLayout(128, 16, 2))
    # The first weights are copied before the previous kernel has written x.
    for slot in gl.static_range(DEPTH - 1):
        _copy_weights(words, pairs, slot, source, pairs_source, output, begin + slot, end, outputs, SPAN)
    _wait_for_previous(PDL)
    for slot in gl.static_range(DEPTH - 1):
        _copy_rows(x, slot, x_source, row, begin + slot, end)
    sums = gl.zeros([TILE, COLUMNS], gl.float32, SUMS)
    nothing = gl.zeros([TILE, COLUMNS], gl.float32, SUMS)
    slot = 0
    for chunk in range(begin, end):
        async_copy.wait_group(DEPTH - 2)
        # Tensor cores read what the copies wrote.
        fence_async_shared()
        word = halves(words.index(slot).load(PAIRS), WEIGHTS, 1)
        zero = pairs.index(slot).load(gl.SliceLayout(1, WEIGHTS)) >> 16
        minus = gl.expand_dims(_minus_zero(zero, DTYPE), 1)
        scale = pairs.index(slot).load(gl.SliceLayout(1, SUMS))
        first = _beside(
            _unpacked(word, minus, 0, "int4", DTYPE), _unpacked(word, minus, 1, "int4", DTYPE), WEIGHTS
        )
        second = _beside(
            _unpacked(word, minus, 2, "int4", DTYPE), _unpacked(word, minus, 3, "int4", DTYPE), WEIGHTS
        )
        rows_of_chunk = x.index(slot)
        products = warpgroup_mma(
            first, rows_of_chunk.slice(0, COLUMNS).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        products = warpgroup_mma(
            second, rows_of_chunk.slice(COLUMNS, COLUMNS).permute((1, 0)), products, is_async=True
        )
        # The slot that was read a step before.
        ahead, following = gl.where(slot == 0, DEPTH - 1, slot - 1), chunk + DEPTH - 1
        _copy_weights(words, pairs, ahead, source, pairs_source, output, following, end, outputs, SPAN)
        _copy_rows(x, ahead, x_source, row, following, end)
        slot = gl.where(slot + 1 == DEPTH, 0, slot + 1)
        if FP16:
            exact = scale.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        else:
            exact = (scale << 16).to(gl.float32, bitcast=True)
        products, first, second = warpgroup_mma_wait(0, deps=[products, first, second])
        sums += products * gl.expand_dims(exact, 1)
    async_copy.wait_group(0)

    output = tile + gl.arange(0, TILE, layout=gl.SliceLayout(1, SUMS))[:, None]
    column = first_row + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SUMS))[None, :]
    mask = (output < outputs) & (column < rows)
    offset = column * outputs + output
    last = True
    if SPLIT:
        gl.store(partial_ptr + split * rows * outputs + offset, sums, mask=mask)
        # All threads must have written before the program counts itself as finished.
        block_barrier()
        counter = counters_ptr + gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        last = gl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if last:
            gl.store(counter, 0)
            sums = gl.zeros([TILE, COLUMNS], gl.float32, SUMS)
            for part in range(splits):
                sums += gl.load(partial_ptr + part * rows * outputs + offset, mask=mask, other=0.0)
    if last:
        if BIAS:
            sums += gl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(gl.float32)
        if COLUMNS <= 64:
            gl.store(out_ptr + offset, sums.to(DTYPE), mask=mask)
        else:
            # So many are worth an exchange for 16 bytes a thread, outputs of a row side by side.
            STORE: gl.constexpr = gl.BlockedLayout([8, 1], [TILE // 8, 256 // TILE], [1, WARPS], [0, 1])
            result = gl.convert_layout(sums.to(DTYPE), STORE)
            stored = tile + gl.arange(0, TILE, layout=gl.SliceLayout(1, STORE))[:, None]
            stored_row = first_row + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, STORE))[None, :]
            gl.store(
                out_ptr + stored_row * outputs + stored, result, mask=(stored < outputs) & (stored_row < rows)
            )
