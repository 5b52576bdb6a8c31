"""GEMM of 2 to 64 rows, in fp8 up to 256, for Hopper GPUs, for a consumer that adds up what its programs have summed.
In fp8 a program may have a tile to itself, too.

As in :mod:`engine.kernels.skinny_gemm` a tile of weights is the left operand of the tensor cores, the rows are the
right one, and several programs share the inputs of a tile. Weights and rows come to a ring of buffers in shared memory
through tensor memory descriptors (TMA). The ring is filled with weights before the previous kernel has finished,
where there is room beside its programs: those of attention's output come while attention ends.

Gluon has no interpreter, so the tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.device import MEMORY_BOUND_ROWS, has_descriptor, is_hopper, num_sms
from engine.kernels.fp8 import FP8, MAX_FAST_INPUTS, Scale
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.ring import (
    DTYPES,
    STEP_BYTES,
    barriers,
    block_barrier,
    buffers,
    describe,
    described,
    tma_load,
)
from engine.kernels.split_sums import SplitSums

#: With fewer inputs, and with fewer in fp8, skinny_gemm.py is as fast.
_MIN_INPUTS, _MIN_ROUNDED_INPUTS = 1024, 8192
#: More rows were not measured.
_MOST_ROUNDED_ROWS = 256
#: Of a program that has a tile to itself, without split-K: beside the rings of two such there is room for attention's
#: programs, which begin meanwhile.
_TILE_DEPTH, _MIN_TILE_INPUTS = 6, 2048
_wait_for_previous = gluon.jit(wait_for_previous.fn)


@dataclass(frozen=True, slots=True)
class RingTile:
    """How a program multiplies.

    Attributes:
        outputs: of a tile.
        depth: steps in the ring.
        splits: programs that share the inputs of a tile.
        rows: of a tile.
    """

    outputs: int
    depth: int
    splits: int
    rows: int = MEMORY_BOUND_ROWS


def choose_tile(rows: int, outputs: int, inputs: int, *, itemsize: int, sms: int) -> RingTile:
    """Choose the tile of a problem. Of about a dozen it is the best on an H200, or within 1 % of the best, by the time
    of whole layers of models of 2 and 7 billion parameters with 64 rows.

    Args:
        rows: more than 64 were measured in fp8 and for 18 944 inputs alone.
        itemsize: bytes of an element.
        sms: SMs of the GPU.
    """
    tiles, steps = triton.cdiv(outputs, 64), triton.cdiv(inputs * itemsize, STEP_BYTES)
    # One program on an SM, with as many steps as fit; a few steps are all loaded in advance.
    programs, depth = (sms, 13) if 2 * tiles <= sms else (2 * sms, 6)
    if itemsize == 1 and steps >= 128 and rows > 16:
        # fp8 with many inputs: two programs per SM take turns, one computes while the other's tiles arrive.
        programs, depth = 2 * sms, 4
    if rows > MEMORY_BOUND_ROWS:
        shared = 2 * sms // (tiles * triton.cdiv(rows, 128))
        return RingTile(64, 4, max(2, min(shared, triton.cdiv(steps, 8))), 128)
    # Two heights only: a kernel per power of two would make start-up longer.
    height = 16 if rows <= 16 else 64
    return RingTile(64, depth, max(2, min(programs // tiles, triton.cdiv(steps, 8))), height)


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the kernel should multiply ``x`` ``(T, K)`` by ``weight`` ``(N, K)``."""
    rounded = x.element_size() == 1
    fits = weight.shape[1] >= (_MIN_ROUNDED_INPUTS if rounded else _MIN_INPUTS)
    known = x.dtype == weight.dtype and x.dtype in DTYPES
    fits = fits and known and 1 < x.shape[0] <= (_MOST_ROUNDED_ROWS if rounded else MEMORY_BOUND_ROWS)
    return fits and has_descriptor(x) and has_descriptor(weight) and is_hopper(x.device)


def supports_tiles(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether programs should compute a tile of ``x @ weight.T`` each: of rows in fp8, where there are about as
    many tiles as SMs, and no more. Otherwise skinny_gemm.py is as fast, or was not compared."""
    (rows, inputs), tiles, sms = x.shape, triton.cdiv(len(weight), 64), num_sms(x.device)
    fits = 16 < rows <= MEMORY_BOUND_ROWS and _MIN_TILE_INPUTS <= inputs <= MAX_FAST_INPUTS
    fits = fits and tiles <= sms <= 2 * tiles and x.dtype == weight.dtype == FP8
    return fits and has_descriptor(x) and has_descriptor(weight) and is_hopper(x.device)


def ring_gemm_gluon(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: Scale | None = None,
    row_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> SplitSums:
    """See :func:`engine.kernels.dispatch.split_linear`; for what :func:`supports` admits.

    Args:
        scale, row_scale, dtype: see :func:`engine.kernels.skinny_gemm.skinny_gemm_triton`; both scales or none.
    """
    tile = choose_tile(x.shape[0], len(weight), x.shape[1], itemsize=x.element_size(), sms=num_sms(x.device))
    out = torch.empty((tile.splits, x.shape[0], len(weight)), dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, out, tile, scale, row_scale)
    return SplitSums(out, dtype or x.dtype)


def tile_gemm_gluon(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scale: Scale,
    row_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.linear`; for what :func:`supports_tiles` admits. The tensor cores alone sum
    up the products, see :data:`~engine.kernels.fp8.MAX_FAST_INPUTS`."""
    out = torch.empty((x.shape[0], len(weight)), dtype=dtype, device=x.device)
    _launch(x, weight, bias, out, RingTile(64, _TILE_DEPTH, 1), scale, row_scale)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: RingTile,
    scale: Scale | None,
    row_scale: torch.Tensor | None,
) -> None:
    """Multiply; ``out`` takes the result, or the sums of each split."""
    (rows, inputs), outputs = x.shape, len(weight)
    assert weight.shape[1] == inputs and (scale is None) == (row_scale is None) == (x.dtype != FP8)
    assert scale is None or scale.values.shape == (outputs, 1)
    columns = tile.rows
    width = STEP_BYTES // x.element_size()
    launch(
        _ring_gemm_kernel, (triton.cdiv(outputs, tile.outputs), tile.splits, triton.cdiv(rows, columns)),
        x_desc=describe(x, columns), weight_desc=described(weight, tile.outputs),
        bias_ptr=out if bias is None else bias, out_ptr=out, scale_ptr=out if scale is None else scale.values,
        row_scale_ptr=out if row_scale is None else row_scale, rows=rows, outputs=outputs,
        steps=triton.cdiv(inputs, width), ROWS=columns, TILE=tile.outputs, WIDTH=width, DEPTH=tile.depth,
        BIAS=bias is not None, FAST=out.dim() == 2, num_warps=4, **pdl_options(x),
    )  # fmt: skip


# ``rows`` differs between batches; specialising on it would compile the kernel again at start-up.
@gluon.jit(do_not_specialize=["rows"])
def _ring_gemm_kernel(
    x_desc, weight_desc, bias_ptr, out_ptr, scale_ptr, row_scale_ptr, rows, outputs, steps, ROWS: gl.constexpr,
    TILE: gl.constexpr, WIDTH: gl.constexpr, DEPTH: gl.constexpr, BIAS: gl.constexpr, FAST: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """One program per tile of outputs and share of the inputs.

    Args:
        out_ptr: ``(shares, rows, outputs)``, each share's sums, of which the first has the bias; float32 if there
            are several.
        scale_ptr: ``(outputs,)``, and row_scale_ptr: ``(rows,)``, float32; for fp8.
        FAST: sums of fp8 products are added up by the tensor cores.
    """
    FP8: gl.constexpr = x_desc.dtype.primitive_bitwidth == 8
    BYTES: gl.constexpr = (TILE + ROWS) * WIDTH * x_desc.dtype.primitive_bitwidth // 8
    # The tensor cores take 32 bytes of a row at a time.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, WIDTH // 4])
    tile, split, top = gl.program_id(0) * TILE, gl.program_id(1), gl.program_id(2) * ROWS
    share = (steps + gl.num_programs(1) - 1) // gl.num_programs(1)
    first = split * share
    count = gl.minimum(share, steps - first)
    weights = buffers(DEPTH, TILE, WIDTH, x_desc.dtype)
    x = buffers(DEPTH, ROWS, WIDTH, x_desc.dtype)
    ready = barriers(DEPTH, 1)
    fence_async_shared()
    block_barrier()
    for slot in gl.static_range(DEPTH):
        known = slot < count
        mbarrier.expect(ready.index(slot), BYTES, pred=known)
        k = (first + slot) * WIDTH
        tma_load(weight_desc, [tile, k], ready.index(slot), weights.index(slot), pred=known)
    # Scales and biases before the PDL wait: see skinny_gemm.py.
    output = tile + gl.arange(0, TILE, gl.SliceLayout(1, SUMS))
    if FP8:
        scale = gl.load(scale_ptr + output, mask=output < outputs, other=0.0)
    if BIAS:
        biased = gl.where(split == 0, outputs, 0)
        bias = gl.load(bias_ptr + output, mask=output < biased, other=0.0)
    _wait_for_previous(PDL)
    for slot in gl.static_range(DEPTH):
        k = (first + slot) * WIDTH
        tma_load(x_desc, [top, k], ready.index(slot), x.index(slot), pred=slot < count)
    if FP8:
        row = top + gl.arange(0, ROWS, gl.SliceLayout(0, SUMS))
        row_scale = gl.load(row_scale_ptr + row, mask=row < rows, other=0.0)
    sums = gl.zeros([TILE, ROWS], gl.float32, SUMS)
    nothing = gl.zeros([TILE, ROWS], gl.float32, SUMS)
    slot, phase, before = 0, 0, DEPTH - 1
    for step in range(count):
        mbarrier.wait(ready.index(slot), phase)
        right = x.index(slot).permute((1, 0))
        left = weights.index(slot)
        if FP8 and not FAST:
            # The tensor cores keep 14 bits of sums of fp8 products, so those of a step are added up outside.
            products = warpgroup_mma(left, right, nothing, use_acc=False, is_async=True)
            products = warpgroup_mma_wait(0, deps=[products])
            sums += products
            free, following = slot, step + DEPTH
        else:
            sums = warpgroup_mma(left, right, sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])
            # The products before these have ended.
            free, following = before, gl.where(step > 0, step - 1 + DEPTH, count)
        block_barrier()
        known = following < count
        k = (first + following) * WIDTH
        mbarrier.expect(ready.index(free), BYTES, pred=known)
        tma_load(weight_desc, [tile, k], ready.index(free), weights.index(free), pred=known)
        tma_load(x_desc, [top, k], ready.index(free), x.index(free), pred=known)
        before = slot
        slot += 1
        if slot == DEPTH:
            slot = 0
            phase ^= 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    # What follows may use the memory of the ring.
    block_barrier()
    if FP8:
        sums *= scale[:, None] * row_scale[None, :]
    if BIAS:
        sums += bias.to(gl.float32)[:, None]

    # Four outputs a thread, so that those of a row are stored together.
    STORED: gl.constexpr = gl.BlockedLayout([4, 1], [TILE // 4, 128 // TILE], [1, 4], [0, 1])
    sums = gl.convert_layout(sums, STORED)
    stored = tile + gl.arange(0, TILE, gl.SliceLayout(1, STORED))
    stored_row = top + gl.arange(0, ROWS, gl.SliceLayout(0, STORED))
    offset = (split * rows + stored_row)[None, :] * outputs + stored[:, None]
    gl.store(
        out_ptr + offset,
        sums.to(out_ptr.dtype.element_ty),
        mask=(stored < outputs)[:, None] & (stored_row < rows)[None, :],
    )
