"""Gated GEMM of 17 to 64 rows for Hopper GPUs, whose outputs all SMs share evenly.

As in :mod:`engine.kernels.ring_gemm` weights and rows come to a ring of buffers through tensor memory descriptors. One
program runs on each SM. Most of its outputs are a tile: its weights are the left operand of the tensor cores, the rows
are the right one. The few outputs that are left over, an equal share for each program, are a second tile with the
operands exchanged, since the right one may be narrow. With tiles alone some SMs would have one more than others, and
the GEMM would last as long as theirs.

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

#: Outputs of the tile of a program; with fewer to compute, skinny_gemm.py is as fast.
_TILE = 128
#: Most outputs that are left over for a program.
_MOST_REST = 16
#: Bytes of shared memory for a ring.
_RING_BYTES = 216 << 10
_wait_for_previous = gluon.jit(wait_for_previous.fn)
_activate = gluon.jit(activate.fn)


@dataclass(frozen=True, slots=True)
class GateShare:
    """What a program computes besides its tile.

    Attributes:
        rest: outputs left over, a multiple of 4.
        box: of the tile of these, ``rest`` or more.
        depth: steps in the ring.
    """

    rest: int
    box: int
    depth: int


def choose_share(outputs: int, sms: int) -> GateShare | None:
    """Share ``outputs``, after the gate, among ``sms`` programs; None if the shares don't fit the kernel."""
    rest = triton.cdiv(triton.cdiv(outputs, sms) - _TILE, 4) * 4
    if not 0 < rest <= _MOST_REST:
        return None
    box = max(8, triton.next_power_of_2(rest))
    return GateShare(rest, box, _RING_BYTES // ((2 * _TILE + 2 * box + MEMORY_BOUND_ROWS) * STEP_BYTES))


def supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether the kernel should multiply ``x`` ``(T, K)`` by ``weight`` ``(2 * N, K)``."""
    few = 16 < x.shape[0] <= MEMORY_BOUND_ROWS and bias is None
    known = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not (few and known and has_descriptor(x) and has_descriptor(weight) and is_hopper(x.device)):
        return False
    return choose_share(len(weight) // 2, num_sms(x.device)) is not None


def ring_gate_gluon(x: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.linear`; for what :func:`supports` admits."""
    (rows, inputs), outputs, programs = x.shape, len(weight) // 2, num_sms(x.device)
    share = choose_share(outputs, programs)
    assert share is not None and weight.shape[1] == inputs
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    width = STEP_BYTES // x.element_size()
    launch(
        _ring_gate_kernel, (programs,),
        x_desc=describe(x, MEMORY_BOUND_ROWS), weight_desc=described(weight, _TILE),
        rest_desc=described(weight, share.box), out_ptr=out, rows=rows, outputs=outputs,
        steps=triton.cdiv(inputs, width), rest=share.rest, ROWS=MEMORY_BOUND_ROWS, TILE=_TILE, BOX=share.box,
        WIDTH=width, DEPTH=share.depth, ACTIVATION=activation, num_warps=4, **pdl_options(x),
    )  # fmt: skip
    return out


# ``rows`` differs between batches; specialising on it would compile the kernel again at start-up.
@gluon.jit(do_not_specialize=["rows", "rest"])
def _ring_gate_kernel(
    x_desc, weight_desc, rest_desc, out_ptr, rows, outputs, steps, rest, ROWS: gl.constexpr, TILE: gl.constexpr,
    BOX: gl.constexpr, WIDTH: gl.constexpr, DEPTH: gl.constexpr, ACTIVATION: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program per SM: a tile of ``TILE`` outputs, and ``rest`` of those after all tiles.

    Args:
        out_ptr: ``(rows, outputs)``.
        BOX: rows of weights that are loaded for the rest, and as many that they gate.
    """
    BYTES: gl.constexpr = (2 * TILE + 2 * BOX + ROWS) * WIDTH * x_desc.dtype.primitive_bitwidth // 8
    # The tensor cores take 32 bytes of a row at a time.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, WIDTH // 4])
    ENDS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BOX, WIDTH // 4])
    tile = gl.program_id(0) * TILE
    first = gl.num_programs(0) * TILE + gl.program_id(0) * rest
    weights = buffers(DEPTH, 2 * TILE, WIDTH, x_desc.dtype)
    others = buffers(DEPTH, 2 * BOX, WIDTH, x_desc.dtype)
    x = buffers(DEPTH, ROWS, WIDTH, x_desc.dtype)
    ready = barriers(DEPTH, 1)
    fence_async_shared()
    block_barrier()
    for slot in gl.static_range(DEPTH):
        known, k = slot < steps, slot * WIDTH
        mbarrier.expect(ready.index(slot), BYTES, pred=known)
        _load_gated(weight_desc, tile, outputs, k, ready.index(slot), weights.index(slot), known, TILE)
        _load_gated(rest_desc, first, outputs, k, ready.index(slot), others.index(slot), known, BOX)
    _wait_for_previous(PDL)
    for slot in gl.static_range(DEPTH):
        tma_load(x_desc, [0, slot * WIDTH], ready.index(slot), x.index(slot), pred=slot < steps)
    gate = gl.zeros([TILE, ROWS], gl.float32, SUMS)
    up = gl.zeros([TILE, ROWS], gl.float32, SUMS)
    ends = gl.zeros([ROWS, 2 * BOX], gl.float32, ENDS)
    slot, phase, before = 0, 0, DEPTH - 1
    for step in range(steps):
        mbarrier.wait(ready.index(slot), phase)
        left = weights.index(slot)
        right = x.index(slot).permute((1, 0))
        gate = warpgroup_mma(left.slice(0, TILE, 0), right, gate, is_async=True)
        up = warpgroup_mma(left.slice(TILE, TILE, 0), right, up, is_async=True)
        ends = warpgroup_mma(x.index(slot), others.index(slot).permute((1, 0)), ends, is_async=True)
        gate, up, ends = warpgroup_mma_wait(3, deps=[gate, up, ends])
        # The products of the step before have ended.
        block_barrier()
        following = gl.where(step > 0, step - 1 + DEPTH, steps)
        known, k = following < steps, following * WIDTH
        mbarrier.expect(ready.index(before), BYTES, pred=known)
        _load_gated(weight_desc, tile, outputs, k, ready.index(before), weights.index(before), known, TILE)
        _load_gated(rest_desc, first, outputs, k, ready.index(before), others.index(before), known, BOX)
        tma_load(x_desc, [0, k], ready.index(before), x.index(before), pred=known)
        before = slot
        slot += 1
        if slot == DEPTH:
            slot = 0
            phase ^= 1
    gate, up, ends = warpgroup_mma_wait(0, deps=[gate, up, ends])
    # What follows may use the memory of the ring.
    block_barrier()

    # Four outputs a thread, so that those of a row are stored together.
    STORED: gl.constexpr = gl.BlockedLayout([4, 1], [TILE // 4, 128 // TILE], [1, 4], [0, 1])
    result = gl.convert_layout((_activate(gate, ACTIVATION) * up).to(out_ptr.dtype.element_ty), STORED)
    output = tile + gl.arange(0, TILE, gl.SliceLayout(1, STORED))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, STORED))
    gl.store(out_ptr + row[None, :] * outputs + output[:, None], result, mask=(row < rows)[None, :])

    # A thread has whole rows of the rest: gates, then what they gate.
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 2 * BOX], [32, 1], [4, 1], [1, 0])
    HALF: gl.constexpr = gl.BlockedLayout([1, BOX], [32, 1], [4, 1], [1, 0])
    gates, ups = gl.convert_layout(ends, WHOLE).reshape([ROWS, 2, BOX]).permute((0, 2, 1)).split()
    result = (_activate(gates, ACTIVATION) * ups).to(out_ptr.dtype.element_ty)
    result = gl.convert_layout(result, HALF)
    place = gl.arange(0, BOX, gl.SliceLayout(0, HALF))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, HALF))
    mask = ((place < rest) & (first + place < outputs))[None, :] & (row < rows)[:, None]
    gl.store(out_ptr + row[:, None] * outputs + (first + place)[None, :], result, mask=mask)


@gluon.jit
def _load_gated(desc, first, outputs, k, ready, target, known, COUNT: gl.constexpr):
    """Start to load ``COUNT`` rows of the gate's weights, and those that they gate."""
    tma_load(desc, [first, k], ready, target.slice(0, COUNT, 0), pred=known)
    tma_load(desc, [outputs + first, k], ready, target.slice(COUNT, COUNT, 0), pred=known)
