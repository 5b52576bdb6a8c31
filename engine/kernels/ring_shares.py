"""GEMM of 17 to 64 rows for Hopper GPUs, with a gate or without, whose outputs SMs share evenly.

As in :mod:`engine.kernels.ring_gemm` weights and rows come to a ring of buffers through tensor memory descriptors. An SM
runs one program at a time, which has an equal share of the outputs. With tiles of 64 outputs some SMs would have one
more than others, and the GEMM would last as long as theirs. The rows are the left operand of the tensor cores, 64 rows
high. The right one, weights, may have any multiple of 8 outputs; layouts have powers of two, so the outputs of a program
are two tiles. The second one may have rows that nothing is loaded to; their results are not stored.

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

from engine.kernels.activation import activate
from engine.kernels.device import MEMORY_BOUND_ROWS, has_descriptor, is_hopper, num_sms
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.ring import (
    STEP_BYTES,
    barriers,
    block_barrier,
    buffers,
    describe,
    described,
    tma_load,
)

#: Most outputs of a program.
_MOST_OUTPUTS = 144
#: With fewer outputs for each SM, and with fewer inputs, skinny_gemm.py is as fast or was not compared.
_MIN_OUTPUTS, _MIN_INPUTS = 80, 2048
#: Least outputs of a program without a gate. Each program reads all rows from L2, which takes less than reading weights
#: where programs have many.
_PLAIN_OUTPUTS = 128
#: Bytes of shared memory for a ring.
_RING_BYTES = 176 << 10
#: Steps whose weights are loaded before the previous kernel, a norm, has ended: with more it takes longer.
_AHEAD = 2
_wait_for_previous = gluon.jit(wait_for_previous.fn)
_activate = gluon.jit(activate.fn)


@dataclass(frozen=True, slots=True)
class OutputShare:
    """The outputs of a program.

    Attributes:
        outputs: of a program, a multiple of 8; with a gate, after it.
        tile: of these in the first tile, a power of two.
        box: of the others that are loaded at once, a power of two that divides their number.
        rest: rows of the second tile, a power of two.
        depth: steps in the ring.
    """

    outputs: int
    tile: int
    box: int
    rest: int
    depth: int


def choose_share(outputs: int, sms: int, *, gated: bool) -> OutputShare | None:
    """Share ``outputs``, after the gate if it is ``gated``, among programs of which each of ``sms`` SMs has the same
    number, or one or none; None if the shares don't fit the kernel. By the time of whole layers of models of 7 to 33
    billion parameters with 64 rows, on an H200."""
    rounds = triton.cdiv(outputs, _MOST_OUTPUTS * sms)
    if rounds > (2 if gated else 1) or outputs < rounds * _MIN_OUTPUTS * sms:
        return None
    each = triton.cdiv(triton.cdiv(outputs, rounds * sms), 8) * 8
    return share_of(each if gated else max(each, _PLAIN_OUTPUTS), gated=gated)


def share_of(outputs: int, *, gated: bool) -> OutputShare:
    """Divide a program's ``outputs``, a multiple of 8 and at least 16, in two tiles."""
    tile = triton.next_power_of_2(outputs) // 2
    others = outputs - tile
    rest = triton.next_power_of_2(others)
    bytes_of_step = ((tile + rest) * (2 if gated else 1) + MEMORY_BOUND_ROWS) * STEP_BYTES
    return OutputShare(outputs, tile, others & -others, rest, _RING_BYTES // bytes_of_step)


def supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool) -> bool:
    """Return whether the kernel should multiply ``x`` ``(T, K)`` by ``weight``, ``(2 * N, K)`` if it is ``gated``, else
    ``(N, K)``."""
    few = 16 < x.shape[0] <= MEMORY_BOUND_ROWS and bias is None and x.shape[1] >= _MIN_INPUTS
    known = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not (few and known and has_descriptor(x) and has_descriptor(weight) and is_hopper(x.device)):
        return False
    outputs = len(weight) // 2 if gated else len(weight)
    return choose_share(outputs, num_sms(x.device), gated=gated) is not None


def ring_shares_gluon(x: torch.Tensor, weight: torch.Tensor, activation: str | None = None) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.linear`; for what :func:`supports` admits."""
    gated = activation is not None
    (rows, inputs), outputs = x.shape, len(weight) // 2 if gated else len(weight)
    share = choose_share(outputs, num_sms(x.device), gated=gated)
    assert share is not None and weight.shape[1] == inputs
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    width = STEP_BYTES // x.element_size()
    launch(
        _ring_shares_kernel, (triton.cdiv(outputs, share.outputs),),
        x_desc=describe(x, MEMORY_BOUND_ROWS), tile_desc=described(weight, share.tile),
        rest_desc=described(weight, share.box), out_ptr=out, rows=rows, outputs=outputs,
        steps=triton.cdiv(inputs, width), ROWS=MEMORY_BOUND_ROWS, SHARE=share.outputs, TILE=share.tile,
        BOX=share.box, REST=share.rest, WIDTH=width, DEPTH=share.depth, AHEAD=min(_AHEAD, share.depth),
        ACTIVATION=activation or "", num_warps=4, **pdl_options(x),
    )  # fmt: skip
    return out


# ``rows`` differs between batches; specialising on it would compile the kernel again at start-up.
@gluon.jit(do_not_specialize=["rows"])
def _ring_shares_kernel(
    x_desc, tile_desc, rest_desc, out_ptr, rows, outputs, steps, ROWS: gl.constexpr, SHARE: gl.constexpr,
    TILE: gl.constexpr, BOX: gl.constexpr, REST: gl.constexpr, WIDTH: gl.constexpr, DEPTH: gl.constexpr,
    AHEAD: gl.constexpr, ACTIVATION: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program per share of the outputs.

    Args:
        out_ptr: ``(rows, outputs)``.
        SHARE: outputs of a program. The first TILE are a tile, the others the first ones of another, of REST.
        AHEAD: steps whose weights are loaded before the previous kernel has ended.
    """
    PARTS: gl.constexpr = 2 if ACTIVATION != "" else 1
    BYTES: gl.constexpr = (PARTS * SHARE + ROWS) * WIDTH * x_desc.dtype.primitive_bitwidth // 8
    # The tensor cores take 32 bytes of a row at a time.
    TILES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PARTS * TILE, WIDTH // 4])
    RESTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PARTS * REST, WIDTH // 4])
    first = gl.program_id(0) * SHARE
    tiles = buffers(DEPTH, PARTS * TILE, WIDTH, x_desc.dtype)
    rests = buffers(DEPTH, PARTS * REST, WIDTH, x_desc.dtype)
    x = buffers(DEPTH, ROWS, WIDTH, x_desc.dtype)
    ready = barriers(DEPTH, 1)
    fence_async_shared()
    block_barrier()
    for slot in gl.static_range(DEPTH):
        known = slot < steps
        mbarrier.expect(ready.index(slot), BYTES, pred=known)
        if slot < AHEAD:
            _load_weights(
                tile_desc, rest_desc, first, outputs, slot * WIDTH, ready.index(slot), tiles.index(slot), rests.index(slot),
                known, PARTS, SHARE, TILE, BOX, REST,
            )  # fmt: skip
    _wait_for_previous(PDL)
    for slot in gl.static_range(DEPTH):
        known, k = slot < steps, slot * WIDTH
        tma_load(x_desc, [0, k], ready.index(slot), x.index(slot), pred=known)
        if slot >= AHEAD:
            _load_weights(
                tile_desc, rest_desc, first, outputs, k, ready.index(slot), tiles.index(slot), rests.index(slot),
                known, PARTS, SHARE, TILE, BOX, REST,
            )  # fmt: skip
    sums = gl.zeros([ROWS, PARTS * TILE], gl.float32, TILES)
    ends = gl.zeros([ROWS, PARTS * REST], gl.float32, RESTS)
    slot, phase, before = 0, 0, DEPTH - 1
    for step in range(steps):
        mbarrier.wait(ready.index(slot), phase)
        sums = warpgroup_mma(x.index(slot), tiles.index(slot).permute((1, 0)), sums, is_async=True)
        ends = warpgroup_mma(x.index(slot), rests.index(slot).permute((1, 0)), ends, is_async=True)
        sums, ends = warpgroup_mma_wait(2, deps=[sums, ends])
        # The products of the step before have ended.
        block_barrier()
        following = gl.where(step > 0, step - 1 + DEPTH, steps)
        known, k = following < steps, following * WIDTH
        mbarrier.expect(ready.index(before), BYTES, pred=known)
        _load_weights(
            tile_desc, rest_desc, first, outputs, k, ready.index(before), tiles.index(before), rests.index(before),
            known, PARTS, SHARE, TILE, BOX, REST,
        )  # fmt: skip
        tma_load(x_desc, [0, k], ready.index(before), x.index(before), pred=known)
        before = slot
        slot += 1
        if slot == DEPTH:
            slot = 0
            phase ^= 1
    sums, ends = warpgroup_mma_wait(0, deps=[sums, ends])
    # What follows may use the memory of the ring.
    block_barrier()
    end = gl.minimum(first + SHARE, outputs)
    _store(sums, out_ptr, first, end, rows, outputs, TILE, ACTIVATION)
    _store(ends, out_ptr, first + TILE, end, rows, outputs, REST, ACTIVATION)


@gluon.jit
def _load_weights(
    tile_desc, rest_desc, first, outputs, k, ready, tiles, rests, known,
    PARTS: gl.constexpr, SHARE: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """Start to load a step of a program's weights; with two PARTS also of those that the first ones gate."""
    for part in gl.static_range(PARTS):
        row = first + part * outputs
        tma_load(tile_desc, [row, k], ready, tiles.slice(part * TILE, TILE, 0), pred=known)
        for place in gl.static_range(0, SHARE - TILE, BOX):
            target = rests.slice(part * REST + place, BOX, 0)
            tma_load(rest_desc, [row + TILE + place, k], ready, target, pred=known)


@gluon.jit
def _store(sums, out_ptr, first, end, rows, outputs, COUNT: gl.constexpr, ACTIVATION: gl.constexpr):
    """Store a tile's outputs from ``first`` on, up to ``end``; COUNT of them, after the gate if there is one."""
    ROWS: gl.constexpr = sums.shape[0]
    if ACTIVATION != "":
        gates, ups = sums.reshape([ROWS, 2, COUNT]).permute((0, 2, 1)).split()
        sums = _activate(gates, ACTIVATION) * ups
    # 16 bytes a thread.
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COUNT, COUNT // 8], [4, 1], [1, 0])
    result = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), STORED)
    output = first + gl.arange(0, COUNT, gl.SliceLayout(0, STORED))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, STORED))
    mask = (output < end)[None, :] & (row < rows)[:, None]
    gl.store(out_ptr + row[:, None] * outputs + output[None, :], result, mask=mask)
