"""GEMM with many input rows and a fused gate, for Hopper GPUs: the first layers of a gated MLP.

The GEMM is compute-bound, and torch's is as fast, in fp8 as well. But the gate is memory-bound: as a kernel of its own it
reads the GEMM's output once more, and writes half of it. Here it runs on the accumulators in registers: a tile has as many rows
of the gate's weights as of the others, so that both factors of a product meet in one thread.

Warps are specialised as in :mod:`engine.kernels.expert_gemm`: one warp loads tiles of rows and weights through
tensor memory descriptors (TMA), two groups of four warps multiply half of the rows each. Programs stay and take tile
after tile: the loads of the next tile run while the results of the last one are stored.

Gluon has no interpreter, so the tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from engine.kernels.activation import activate
from engine.kernels.device import has_descriptor, is_hopper, num_sms
from engine.kernels.fp8 import MAX_FAST_INPUTS
from engine.kernels.launch import is_compiling, launch
from engine.kernels.ring import STEP_BYTES, barriers, buffers, describe, described, tma_load

#: Below these rows torch's GEMM plus a gate kernel is faster: it has more tile heights. Here programs with a partial
#: last row tile finish early and drift from those that share their weights, so weights are loaded twice, large ones
#: from memory.
_MIN_ROWS, _MIN_ROWS_LARGE, _MIN_ROWS_ROUNDED = 289, 353, 257
#: Up to so many rows the narrow tile is the faster one, but for three tiles of which the last is not full.
_FEW_ROWS = 1024
#: Bytes of weights of which an L2 keeps only a part until other programs need it.
_MANY_BYTES = 128 << 20
#: Tiles of rows that run together, so that they find each other's weights in L2.
_GROUP = 64
#: Registers per thread: 168 for three groups of four warps use all registers of an SM. The compute groups take
#: what the load warp gives up.
_REGISTERS, _COMPUTE_REGISTERS, _LOAD_REGISTERS = 168, 240, 24
_activate = gluon.jit(activate.fn)


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the kernel should multiply ``x`` ``(T, K)`` by ``weight`` ``(N, K)``."""
    known = x.dtype in (torch.bfloat16, torch.float16) and has_descriptor(x)
    least = _MIN_ROWS_LARGE if weight.nbytes > _MANY_BYTES else _MIN_ROWS
    return known and x.shape[0] >= least and _fits(weight)


def supports_rounded(rows: int, weight: torch.Tensor) -> bool:
    """Return whether the kernel should multiply ``rows`` rows in fp8 by ``weight`` ``(N, K)``, in fp8 too."""
    # The tensor cores sum up all products of an output.
    return weight.shape[1] <= MAX_FAST_INPUTS and rows >= _MIN_ROWS_ROUNDED and _fits(weight)


def _fits(weight: torch.Tensor) -> bool:
    return weight.shape[0] % 16 == 0 and is_hopper(weight.device) and has_descriptor(weight)


@dataclass(frozen=True, slots=True)
class WideTile:
    """Rows and weight rows of a tile, and steps in shared memory at a time."""

    rows: int
    weights: int
    stages: int


_NARROW, _BROAD = WideTile(128, 128, 6), WideTile(128, 256, 4)


def choose_tile(rows: int) -> WideTile:
    """Choose the tile: the faster of two on an H200, for 512 and for 8192 rows."""
    drifts = 2 * _NARROW.rows < rows < 3 * _NARROW.rows
    return _NARROW if rows <= _FEW_ROWS and not drifts else _BROAD


def wide_gemm_gluon(x, weight, bias, activation, *, scale=None, row_scale=None, dtype=None):
    """See :func:`engine.kernels.dispatch.linear`; for ``x`` ``(T, K)`` that :func:`supports` admits.

    Sums, bias and gate are float32; only the result is rounded.

    Args:
        scale, row_scale, dtype: of a weight and rows in fp8: the weight's scales, one an output; those of the rows,
            ``(T, 1)``; and the dtype of the result.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0] // 2
    assert weight.shape[1] == inputs > 0 and x.dtype == weight.dtype
    out = torch.empty((rows, outputs), dtype=dtype or x.dtype, device=x.device)
    if rows == 0:
        return out
    # When compiling ahead of time, compile the kernel for other numbers of rows too.
    for tile in (_NARROW, _BROAD) if is_compiling() else (choose_tile(rows),):
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.weights // 2)
        launch(
            _wide_kernel, (min(tiles, num_sms(x.device)),),
            x_desc=describe(x, tile.rows), weight_desc=described(weight, tile.weights // 2),
            out_ptr=out, bias_ptr=x if bias is None else bias, row_scale_ptr=x if scale is None else row_scale,
            scale_ptr=x if scale is None else scale.values, rows=rows, outputs=outputs, inputs=inputs,
            ROWS=tile.rows, WEIGHTS=tile.weights, INPUTS=STEP_BYTES // x.element_size(), STAGES=tile.stages, GROUP=_GROUP,
            BIAS=bias is not None, SCALED=scale is not None, ACTIVATION=activation,
            COMPUTE_REGISTERS=_COMPUTE_REGISTERS, LOAD_REGISTERS=_LOAD_REGISTERS,
            num_warps=4, maxnreg=_REGISTERS,
        )  # fmt: skip
    return out


# ``rows`` differs between images; specialising on it would compile the kernel again at start-up.
@gluon.jit(do_not_specialize=["rows"])
def _wide_kernel(
    x_desc, weight_desc, out_ptr, bias_ptr, row_scale_ptr, scale_ptr, rows, outputs, inputs,
    ROWS: gl.constexpr, WEIGHTS: gl.constexpr, INPUTS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    BIAS: gl.constexpr, SCALED: gl.constexpr, ACTIVATION: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """At most one program per SM, each for every ``num_programs``-th tile."""
    x = buffers(STAGES, ROWS, INPUTS, x_desc.dtype)
    weights = buffers(STAGES, WEIGHTS, INPUTS, x_desc.dtype)
    # Ready: the step has been loaded. Free: both compute groups have finished with it.
    ready, free = barriers(STAGES, 1), barriers(STAGES, 2)
    ring = (x, weights, ready, free)
    down = gl.cdiv(rows, ROWS)
    columns = gl.cdiv(outputs, WEIGHTS // 2)
    sizes = (rows, outputs, inputs, down, columns)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    out = (out_ptr, bias_ptr, row_scale_ptr, scale_ptr)
    gl.warp_specialize(
        [
            (_multiply, (first, ring, sizes, out, BIAS, SCALED, ACTIVATION, GROUP, STAGES)),
            (_multiply, (second, ring, sizes, out, BIAS, SCALED, ACTIVATION, GROUP, STAGES)),
            (_load_tiles, (x_desc, weight_desc, ring, sizes, GROUP, STAGES)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


@gluon.jit
def _place(tile, down, columns, GROUP: gl.constexpr):
    """Row and column of a tile: up to GROUP tiles of rows run together, those of the same weights first."""
    block = tile // (GROUP * columns)
    height = gl.minimum(down - block * GROUP, GROUP)
    within = tile - block * GROUP * columns
    return block * GROUP + within % height, within // height


@gluon.jit
def _load_tiles(x_desc, weight_desc, ring, sizes, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Load the steps of all tiles of the program, one after the other; run by one warp."""
    x, weights, ready, free = ring
    outputs, inputs, down, columns = sizes[1], sizes[2], sizes[3], sizes[4]
    ROWS: gl.constexpr = x.shape[1]
    WEIGHTS: gl.constexpr = weights.shape[1]
    INPUTS: gl.constexpr = x.shape[2]
    HALF: gl.constexpr = WEIGHTS // 2
    BYTES: gl.constexpr = x.dtype.primitive_bitwidth // 8
    step = 0
    for tile in range(gl.program_id(0), down * columns, gl.num_programs(0)):
        row, column = _place(tile, down, columns, GROUP)
        for k in range(0, inputs, INPUTS):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (ROWS + WEIGHTS) * INPUTS * BYTES)
            tma_load(x_desc, [row * ROWS, k], ready.index(stage), x.index(stage))
            target = weights.index(stage)
            tma_load(weight_desc, [column * HALF, k], ready.index(stage), target.slice(0, HALF, 0))
            other = target.slice(HALF, HALF, 0)
            tma_load(weight_desc, [outputs + column * HALF, k], ready.index(stage), other)
            step += 1


@gluon.jit
def _multiply(
    half: gl.constexpr, ring, sizes, out, BIAS: gl.constexpr, SCALED: gl.constexpr, ACTIVATION: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply half of the rows of each tile; run by one compute group (four warps). ``half``: which one."""
    x, weights, free = ring[0], ring[1], ring[3]
    rows, outputs, inputs, down, columns = sizes
    out_ptr, bias_ptr, row_scale_ptr, scale_ptr = out
    HEIGHT: gl.constexpr = x.shape[1] // 2
    WEIGHTS: gl.constexpr = weights.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, WEIGHTS, 256 // x.dtype.primitive_bitwidth]
    )
    steps = gl.cdiv(inputs, x.shape[2])
    step = 0
    for tile in range(gl.program_id(0), down * columns, gl.num_programs(0)):
        acc = gl.zeros([HEIGHT, WEIGHTS], gl.float32, layout)
        acc = _issue(acc, ring, step, half, False, STAGES)
        acc = warpgroup_mma_wait(1, deps=[acc])
        for index in range(1, steps):
            acc = _issue(acc, ring, step + index, half, True, STAGES)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # The multiplication before this one has ended.
            mbarrier.arrive(free.index((step + index - 1) % STAGES), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + steps - 1) % STAGES), count=1)
        step += steps
        row, column = _place(tile, down, columns, GROUP)
        output = column * (WEIGHTS // 2)
        gate, up = acc.reshape([HEIGHT, 2, WEIGHTS // 2]).permute((0, 2, 1)).split()
        if SCALED:
            own_row = (2 * row + half) * HEIGHT + gl.arange(0, HEIGHT, gl.SliceLayout(1, gate.type.layout))
            factor = gl.load(row_scale_ptr + own_row, mask=own_row < rows, other=0.0)[:, None]
            gate *= factor * of_outputs(scale_ptr, gate, output, outputs)
            up *= factor * of_outputs(scale_ptr + outputs, up, output, outputs)
        gate = _activate(with_bias(gate, bias_ptr, output, outputs, BIAS), ACTIVATION)
        up = with_bias(up, bias_ptr + outputs, output, outputs, BIAS)
        store_outputs(gate * up, out_ptr, (2 * row + half) * HEIGHT, rows, output, outputs)


@gluon.jit
def _issue(acc, ring, step, half: gl.constexpr, USE_ACC: gl.constexpr, STAGES: gl.constexpr):
    """Start to add the products of a step to ``acc``."""
    x, weights, ready = ring[0], ring[1], ring[2]
    HEIGHT: gl.constexpr = x.shape[1] // 2
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), step // STAGES & 1)
    own = x.index(stage).slice(half * HEIGHT, HEIGHT, 0)
    return warpgroup_mma(own, weights.index(stage).permute((1, 0)), acc, use_acc=USE_ACC, is_async=True)


@gluon.jit
def with_bias(x, bias_ptr, first, outputs, BIAS: gl.constexpr):
    if BIAS:
        x += of_outputs(bias_ptr, x, first, outputs)
    return x


@gluon.jit
def of_outputs(values_ptr, like, first, outputs):
    """Load values of the outputs from ``first`` on, which are the columns of ``like``, as a row."""
    column = first + gl.arange(0, like.shape[1], gl.SliceLayout(0, like.type.layout))
    return gl.load(values_ptr + column, mask=column < outputs, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def store_outputs(result, out_ptr, row, rows, first, outputs):
    """Store rows of results from output ``first`` on, in pieces of 16 bytes a thread."""
    ACROSS: gl.constexpr = result.shape[1] // 8 if result.shape[1] < 128 else 16
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    result = gl.convert_layout(result.to(out_ptr.dtype.element_ty), stored)
    output = first + gl.arange(0, result.shape[1], gl.SliceLayout(0, stored))
    place = row + gl.arange(0, result.shape[0], gl.SliceLayout(1, stored))
    mask = (place < rows)[:, None] & (output < outputs)[None, :]
    gl.store(out_ptr + (place.to(gl.int64) * outputs)[:, None] + output[None, :], result, mask=mask)
