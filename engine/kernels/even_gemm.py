"""GEMM of many rows in fp8 for Hopper GPUs, with a tile for each SM: linear layers of a prompt.

cuBLASLt's kernels that multiply sums by scales of rows have tiles of 128 rows by 128 outputs only. Where those are
a few more than SMs, the GEMM takes as long as two for each; where they are half as many, half of the SMs have none.
Here tiles are wider or narrower, so that all are computed at once.

Warps are specialised as in :mod:`engine.kernels.wide_gemm`. The operands of Triton's products have powers of two as
sizes: the outputs of a wider tile are two products.

Gluon has no interpreter, so the tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from engine.kernels.device import has_descriptor, is_hopper
from engine.kernels.fp8 import MAX_FAST_INPUTS, RoundedRows, Scale
from engine.kernels.launch import launch
from engine.kernels.ring import STEP_BYTES, barriers, buffers, describe, described, tma_load
from engine.kernels.wide_gemm import of_outputs, store_outputs, with_bias

#: Rows of a tile, and outputs of a tile of cuBLASLt.
_ROWS, _USUAL = 128, 128
#: Registers per thread, as in wide_gemm.py.
_REGISTERS, _COMPUTE_REGISTERS, _LOAD_REGISTERS = 168, 240, 24


@dataclass(frozen=True, slots=True)
class EvenTile:
    """Outputs of a tile, in its first product and in its second one, and steps in shared memory at a time."""

    first: int
    second: int
    stages: int

    @property
    def outputs(self) -> int:
        return self.first + self.second


NARROW, WIDE = EvenTile(64, 0, 8), EvenTile(128, 16, 6)


def choose_tile(rows: int, outputs: int, sms: int) -> EvenTile | None:
    """Choose the tile of which an SM has one or none; None where cuBLASLt's suit the SMs better."""
    down = triton.cdiv(rows, _ROWS)
    if down * triton.cdiv(outputs, NARROW.outputs) <= sms:
        return NARROW
    alone = down * triton.cdiv(outputs, _USUAL) <= sms
    return WIDE if not alone and down * triton.cdiv(outputs, WIDE.outputs) <= sms else None


def possible_tiles(outputs: int, sms: int) -> list[EvenTile]:
    """Return the tiles that :func:`choose_tile` may choose for some number of rows."""
    chosen = [choose_tile(down * _ROWS, outputs, sms) for down in range(1, sms + 1)]
    return [tile for tile in (NARROW, WIDE) if tile in chosen]


def supports(weight: torch.Tensor) -> bool:
    """Return whether the kernel can multiply rows in fp8 by ``weight`` ``(N, K)``, in fp8 too."""
    return len(weight) % 16 == 0 and is_hopper(weight.device) and has_descriptor(weight)


def even_gemm_gluon(
    x: RoundedRows,
    weight: torch.Tensor,
    scale: Scale,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    tile: EvenTile,
) -> torch.Tensor:
    """See :func:`engine.kernels.fp8.scaled_gemm`; for a weight that :func:`supports` admits.

    Sums and bias are float32; only the result is rounded.
    """
    (rows, inputs), outputs = x.numbers.shape, len(weight)
    assert weight.shape[1] == inputs > 0 < rows
    out = torch.empty((rows, outputs), dtype=dtype, device=weight.device)
    launch(
        _even_kernel, (triton.cdiv(rows, _ROWS) * triton.cdiv(outputs, tile.outputs),),
        x_desc=describe(x.numbers, _ROWS), first_desc=described(weight, tile.first),
        second_desc=described(weight, tile.second or tile.first), out_ptr=out,
        bias_ptr=out if bias is None else bias, row_scale_ptr=x.scale, scale_ptr=scale.values, rows=rows,
        outputs=outputs, inputs=inputs, FAST=inputs <= MAX_FAST_INPUTS, ROWS=_ROWS, FIRST=tile.first, SECOND=tile.second, INPUTS=STEP_BYTES,
        STAGES=tile.stages, BIAS=bias is not None, COMPUTE_REGISTERS=_COMPUTE_REGISTERS,
        LOAD_REGISTERS=_LOAD_REGISTERS, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
    return out


# ``rows`` differs between prompts; specialising on it would compile the kernel again at start-up.
@gluon.jit(do_not_specialize=["rows"])
def _even_kernel(
    x_desc, first_desc, second_desc, out_ptr, bias_ptr, row_scale_ptr, scale_ptr, rows, outputs, inputs,
    FAST: gl.constexpr, ROWS: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr, INPUTS: gl.constexpr,
    STAGES: gl.constexpr, BIAS: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per tile; the tiles of the same weights are neighbours.

    Args:
        FAST: the tensor cores sum up all products of an output, see :data:`~engine.kernels.fp8.MAX_FAST_INPUTS`; else
            those of a step.
    """
    x = buffers(STAGES, ROWS, INPUTS, x_desc.dtype)
    first = buffers(STAGES, FIRST, INPUTS, x_desc.dtype)
    second = first
    if SECOND > 0:
        second = buffers(STAGES, SECOND, INPUTS, x_desc.dtype)
    # Ready: the step has been loaded. Free: both compute groups have finished with it.
    ready, free = barriers(STAGES, 1), barriers(STAGES, 2)
    ring = (x, first, second, ready, free)
    down = gl.cdiv(rows, ROWS)
    row, output = gl.program_id(0) % down * ROWS, gl.program_id(0) // down * (FIRST + SECOND)
    place = (row, output)
    sizes = (rows, outputs, inputs)
    out = (out_ptr, bias_ptr, row_scale_ptr, scale_ptr)
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply, (upper, ring, place, sizes, out, FAST, BIAS, SECOND, STAGES)),
            (_multiply, (lower, ring, place, sizes, out, FAST, BIAS, SECOND, STAGES)),
            (_load, (x_desc, first_desc, second_desc, ring, place, sizes, SECOND, STAGES)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


@gluon.jit
def _load(
    x_desc, first_desc, second_desc, ring, place, sizes, SECOND: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Load the steps of the tile; run by one warp."""
    x, first, second, ready, free = ring
    row, output = place
    inputs = sizes[2]
    INPUTS: gl.constexpr = x.shape[2]
    BYTES: gl.constexpr = (x.shape[1] + first.shape[1] + SECOND) * INPUTS
    step = 0
    for k in range(0, inputs, INPUTS):
        stage = step % STAGES
        mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), BYTES)
        tma_load(x_desc, [row, k], ready.index(stage), x.index(stage))
        tma_load(first_desc, [output, k], ready.index(stage), first.index(stage))
        if SECOND > 0:
            tma_load(second_desc, [output + first.shape[1], k], ready.index(stage), second.index(stage))
        step += 1


@gluon.jit
def _multiply(
    half: gl.constexpr, ring, place, sizes, out, FAST: gl.constexpr, BIAS: gl.constexpr, SECOND: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply half of the tile's rows; run by one compute group (four warps). ``half``: which one."""
    x, first, second, ready, free = ring
    row, output = place
    rows, outputs, inputs = sizes
    HEIGHT: gl.constexpr = x.shape[1] // 2
    acc = _sums(x, first)
    rest = _sums(x, second)
    steps = gl.cdiv(inputs, x.shape[2])
    if FAST:
        for step in range(steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            own = x.index(stage).slice(half * HEIGHT, HEIGHT, 0)
            acc = warpgroup_mma(own, first.index(stage).permute((1, 0)), acc, is_async=True)
            if SECOND > 0:
                rest = warpgroup_mma(own, second.index(stage).permute((1, 0)), rest, is_async=True)
                acc, rest = warpgroup_mma_wait(2, deps=[acc, rest])
            else:
                acc = warpgroup_mma_wait(1, deps=[acc])
            # The products of the step before have ended.
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        if SECOND > 0:
            acc, rest = warpgroup_mma_wait(0, deps=[acc, rest])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
    else:
        for step in range(steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            own = x.index(stage).slice(half * HEIGHT, HEIGHT, 0)
            # While this group adds, the other one multiplies.
            acc += _product(own, first.index(stage), _sums(x, first))
            if SECOND > 0:
                rest += _product(own, second.index(stage), _sums(x, second))
            mbarrier.arrive(free.index(stage), count=1)
    _finish(acc, out, row + half * HEIGHT, output, rows, outputs, BIAS)
    if SECOND > 0:
        _finish(rest, out, row + half * HEIGHT, output + first.shape[1], rows, outputs, BIAS)


@gluon.jit
def _sums(x, weights):
    """Return sums of zero for half of the rows of a tile."""
    OUTPUTS: gl.constexpr = weights.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, OUTPUTS, 256 // x.dtype.primitive_bitwidth]
    )
    return gl.zeros([x.shape[1] // 2, OUTPUTS], gl.float32, layout)


@gluon.jit
def _product(x, weights, zeros):
    """Return the products of a step."""
    product = warpgroup_mma(x, weights.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[product])


@gluon.jit
def _finish(acc, out, row, output, rows, outputs, BIAS: gl.constexpr):
    """Multiply sums by the scales, add the bias and store them, from ``row`` and ``output`` on."""
    out_ptr, bias_ptr, row_scale_ptr, scale_ptr = out
    own_row = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    factor = gl.load(row_scale_ptr + own_row, mask=own_row < rows, other=0.0)[:, None]
    acc *= factor * of_outputs(scale_ptr, acc, output, outputs)
    store_outputs(with_bias(acc, bias_ptr, output, outputs, BIAS), out_ptr, row, rows, output, outputs)
