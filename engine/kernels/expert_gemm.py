"""The MLPs of a mixture of experts for many tokens, for Hopper GPUs: one persistent launch a GEMM.

The general kernel in :mod:`engine.kernels.grouped_gemm` reaches two thirds of cuBLAS's rate for experts with
hundreds of rows. This kernel specialises warps: one group of four warps loads tiles of weights through a tensor
memory descriptor (TMA), and the rows of the expert, which lie anywhere, by asynchronous copies of 16 bytes; two
groups of four warps multiply 64 rows each. A group without rows multiplies nothing, so the last tile of an
expert costs what its rows cost, to a multiple of 64. Programs stay and take tile after tile: the loads of the
next tile run while the results of the last one are stored. Where experts have few rows, a tile has 64 rows and the
groups take turns: one multiplies while the other one stores its results, so that loads of weights never pause.

Gluon has no interpreter, so the tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.activation import activate
from engine.kernels.device import is_hopper, num_sms
from engine.kernels.expert_groups import experts_in_groups
from engine.kernels.experts import ExpertMatrices
from engine.kernels.fp8 import RoundedRows, Scale, quantise_rows, scale_of_row
from engine.kernels.launch import is_compiling, launch
from engine.kernels.ring import STEP_BYTES, barriers, buffers, copy_load, described, tma_load

#: Rows of a tile that a compute group multiplies; weight rows of a tile.
_HEIGHT, _WEIGHTS = 64, 256
#: Up to so many rows of an expert on average the compute groups take turns; with more it was not measured.
_FEW_ROWS = 64
#: Registers per thread: 168 for three groups of four warps use all registers of an SM. The compute groups take
#: what the load group gives up.
_REGISTERS, _COMPUTE_REGISTERS, _LOAD_REGISTERS = 168, 224, 56
_activate, _scale_of_row = gluon.jit(activate.fn), gluon.jit(scale_of_row.fn)


def supports(x: torch.Tensor, matrices: ExpertMatrices) -> bool:
    """Return whether the kernel can multiply rows like those of ``x`` by ``matrices``."""
    weight, scale = matrices.weight, matrices.scale
    if scale is None:
        fits = x.element_size() == 2 and x.dtype == weight.dtype
    else:
        # Rows are rounded to fp8 as well.
        fits = isinstance(scale, Scale) and scale.round_inputs and x.dtype == torch.bfloat16
        if fits and scale.values.shape[1] > 1:
            # A step has the inputs of one group, and half of a tile's weights one scale.
            fits = scale.group == STEP_BYTES and scale.outputs % (_WEIGHTS // 2) == 0
    steps, rest = divmod(weight.shape[2] * weight.element_size(), STEP_BYTES)
    # Rows are copied in pieces of 16 bytes.
    aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return fits and steps >= 2 and rest == 0 and aligned and is_hopper(x.device)


def grouped_experts_gluon(x, ids, weights, gate_up: ExpertMatrices, down: ExpertMatrices, activation):
    """See :func:`engine.kernels.dispatch.experts`; for what :func:`supports` admits."""
    groups = _groups(down)
    return experts_in_groups(
        _grouped_gemm, x, ids, weights, gate_up, down, activation, rounded=groups if groups > 1 else None
    )


def _groups(matrices: ExpertMatrices) -> int:
    """Return how many groups of inputs have scales of their own; 0 without scales."""
    return 0 if matrices.scale is None else matrices.scale.values.shape[1]


def _grouped_gemm(x, matrices, out, order, starts, *, activation=None, factors=None, top_k=1):
    """See :class:`~engine.kernels.expert_groups.GroupedGemm`."""
    experts, outputs, inputs = matrices.weight.shape
    gated, scale, groups = activation is not None, matrices.scale, _groups(matrices)
    outputs = outputs // 2 if gated else outputs
    if isinstance(scale, Scale) and not isinstance(x, RoundedRows):
        x = quantise_rows(x, scale.group if groups > 1 else None)
    # Any tensor does for what is not accessed.
    row_scale = out_scale = order
    if isinstance(x, RoundedRows):
        x, row_scale = x
    rounded = isinstance(out, RoundedRows)
    if rounded:
        out, out_scale = out
    assert out.is_contiguous() and out.shape == (len(order), outputs)
    few = len(order) <= _FEW_ROWS * experts
    # When compiling ahead of time, compile the kernel for other numbers of rows too.
    for turns in (1, 2) if is_compiling() else (2,) if few else (1,):
        launch(
            _expert_gemm_kernel, (num_sms(x.device),),
            # A copy takes a tile's rows, or its gates or its ups.
            x_ptr=x, weight_desc=described(matrices.weight, _WEIGHTS // 2 if gated else _WEIGHTS),
            out_ptr=out, order_ptr=order, starts_ptr=starts,
            factors_ptr=order if factors is None else factors, row_scale_ptr=row_scale,
            scale_ptr=order if scale is None else scale.values, out_scale_ptr=out_scale,
            experts=experts, outputs=outputs, inputs=inputs, x_stride=x.stride(0), TOP_K=top_k,
            EXPERTS=max(32, triton.next_power_of_2(experts)), ACTIVATION=activation or "",
            SCALED=groups == 1, GROUPS=groups > 1, ROUNDED=rounded, TURNS=turns, ROWS=2 * _HEIGHT // turns,
            # As many tiles as shared memory holds.
            STAGES=3 + turns,
            WEIGHTS=_WEIGHTS, INPUTS=STEP_BYTES // x.element_size(), COMPUTE_REGISTERS=_COMPUTE_REGISTERS,
            LOAD_REGISTERS=_LOAD_REGISTERS, num_warps=4, maxnreg=_REGISTERS,
        )  # fmt: skip


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tile_ends(starts_ptr, experts, EXPERTS: gl.constexpr, ROWS: gl.constexpr):
    """Number of tiles of rows of each expert and all before it, ``(EXPERTS,)``, whole in each warp."""
    layout: gl.constexpr = gl.BlockedLayout([EXPERTS // 32], [32], [4], [0])
    expert = gl.arange(0, EXPERTS, layout)
    begin = gl.load(starts_ptr + gl.minimum(expert, experts))
    end = gl.load(starts_ptr + gl.minimum(expert + 1, experts))
    return gl.associative_scan((end - begin + ROWS - 1) // ROWS, 0, _add)


@gluon.jit
def _locate(tile, ends, experts, columns, starts_ptr, ROWS: gl.constexpr):
    """Find a tile's expert, where its rows begin, the tile's first row of them, their count, and its column.

    Tiles of an expert follow each other, those of the same weights first.
    """
    past = ends * columns <= tile
    # Behind the last tile this is the last expert, only to read something.
    expert = gl.minimum(gl.sum(past.to(gl.int32), axis=0), experts - 1)
    before = gl.max(gl.where(past, ends, 0), axis=0)
    upto = gl.min(gl.where(past, 2147483647, ends), axis=0)
    begin = gl.load(starts_ptr + expert)
    count = gl.load(starts_ptr + expert + 1) - begin
    local = tile - before * columns
    height = upto - before
    return expert, begin, local % height * ROWS, count, local // height


@gluon.jit
def _expert_gemm_kernel(
    x_ptr, weight_desc, out_ptr, order_ptr, starts_ptr, factors_ptr, row_scale_ptr, scale_ptr, out_scale_ptr,
    experts, outputs, inputs, x_stride,
    TOP_K: gl.constexpr, EXPERTS: gl.constexpr, ACTIVATION: gl.constexpr, SCALED: gl.constexpr,
    GROUPS: gl.constexpr, ROUNDED: gl.constexpr, TURNS: gl.constexpr, ROWS: gl.constexpr, WEIGHTS: gl.constexpr,
    INPUTS: gl.constexpr, STAGES: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per SM; it takes every so many-th tile.

    Args:
        EXPERTS: padded to a power of two, at least 32.
        SCALED: there are scales of whole rows and outputs.
        GROUPS: the inputs of each step have scales of their own.
        ROUNDED: results are rounded to fp8, a tile's of a row with a scale in out_scale_ptr.
        TURNS: 1: each compute group multiplies half of a tile's rows; 2: they take tiles by turns.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    rows = buffers(STAGES, ROWS, INPUTS, dtype)
    weights = buffers(STAGES, WEIGHTS, INPUTS, dtype)
    # Ready: each of the 128 threads that copy rows, and the copies of weights, have arrived. Free: the compute
    # groups that multiply the tile have finished with the buffers. Turn: the other group has multiplied its tile.
    ready, free, turn = barriers(STAGES, 129), barriers(STAGES, 2 // TURNS), barriers(2, 1)
    ring = (rows, weights, ready, free, turn)
    OUTPUTS: gl.constexpr = WEIGHTS if ACTIVATION == "" else WEIGHTS // 2
    columns = gl.cdiv(outputs, OUTPUTS)
    sizes = (experts, outputs, inputs, columns)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    out = (out_ptr, order_ptr, starts_ptr, factors_ptr, row_scale_ptr, scale_ptr, out_scale_ptr)
    loads = (x_ptr, x_stride, weight_desc, ring, sizes, order_ptr, starts_ptr)
    if GROUPS:
        gl.warp_specialize(
            [
                (
                    _multiply_groups,
                    (first, ring, sizes, out, TOP_K, EXPERTS, ACTIVATION, ROUNDED, TURNS, STAGES),
                ),
                (
                    _multiply_groups,
                    (second, ring, sizes, out, TOP_K, EXPERTS, ACTIVATION, ROUNDED, TURNS, STAGES),
                ),
                (_load_tiles, (loads, TOP_K, EXPERTS, ACTIVATION, STAGES)),
            ],
            [4, 4],
            [COMPUTE_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (first, ring, sizes, out, TOP_K, EXPERTS, ACTIVATION, SCALED, TURNS, STAGES)),
                (_multiply, (second, ring, sizes, out, TOP_K, EXPERTS, ACTIVATION, SCALED, TURNS, STAGES)),
                (_load_tiles, (loads, TOP_K, EXPERTS, ACTIVATION, STAGES)),
            ],
            [4, 4],
            [COMPUTE_REGISTERS, LOAD_REGISTERS],
        )


@gluon.jit
def _load_tiles(
    given, TOP_K: gl.constexpr, EXPERTS: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    x_ptr, x_stride, weight_desc, ring, sizes, order_ptr, starts_ptr = given
    rows, weights, ready, free, _ = ring
    experts, outputs, inputs, columns = sizes
    ROWS: gl.constexpr = rows.shape[1]
    OUTPUTS: gl.constexpr = weights.shape[1]
    INPUTS: gl.constexpr = rows.shape[2]
    PIECE: gl.constexpr = INPUTS // 8
    layout: gl.constexpr = gl.BlockedLayout([1, PIECE], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    lane = gl.arange(0, INPUTS, gl.SliceLayout(0, layout))
    ends = _tile_ends(starts_ptr, experts, EXPERTS, ROWS)
    total = gl.max(ends, axis=0) * columns
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        expert, begin, top, count, column = _locate(tile, ends, experts, columns, starts_ptr, ROWS)
        place = begin + gl.minimum(top + row, count - 1)
        if ACTIVATION != "":
            place = gl.load(order_ptr + place) // TOP_K
        pointers = x_ptr + (place.to(gl.int64) * x_stride)[:, None] + lane[None, :]
        valid = (top + row < count)[:, None]
        for k in range(0, inputs, INPUTS):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(
                ready.index(stage), OUTPUTS * INPUTS * (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
            )
            target = weights.index(stage)
            if ACTIVATION != "":
                gate = expert * 2 * outputs + column * (OUTPUTS // 2)
                tma_load(weight_desc, [gate, k], ready.index(stage), target.slice(0, OUTPUTS // 2, 0))
                half = target.slice(OUTPUTS // 2, OUTPUTS // 2, 0)
                tma_load(weight_desc, [gate + outputs, k], ready.index(stage), half)
            else:
                tma_load(weight_desc, [expert * outputs + column * OUTPUTS, k], ready.index(stage), target)
            copy_load(rows.index(stage), pointers + k, mask=valid)
            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
            step += 1


@gluon.jit
def _multiply(
    half: gl.constexpr, ring, sizes, out, TOP_K: gl.constexpr, EXPERTS: gl.constexpr, ACTIVATION: gl.constexpr,
    SCALED: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply 64 rows of each tile, or of each second tile; run by one compute group (four warps).

    ``half``: which 64 of the tile, or which of two tiles.
    """
    rows, weights, _, free, turn = ring
    experts, outputs, inputs, columns = sizes
    out_ptr, order_ptr, starts_ptr, factors_ptr, row_scale_ptr, scale_ptr, _ = out
    ROWS: gl.constexpr = rows.shape[1]
    HEIGHT: gl.constexpr = ROWS * TURNS // 2
    BEGIN: gl.constexpr = half * HEIGHT if TURNS == 1 else 0
    OUTPUTS: gl.constexpr = weights.shape[1]
    WIDTH: gl.constexpr = OUTPUTS // 2
    INPUTS: gl.constexpr = rows.shape[2]
    # The tensor cores take 32 bytes of a row at a time.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUTPUTS, INPUTS // 4])
    # Rows are stored in pieces of 16 bytes a thread.
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    own_row = BEGIN + gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
    stored_row = BEGIN + gl.arange(0, HEIGHT, gl.SliceLayout(1, stored))
    ends = _tile_ends(starts_ptr, experts, EXPERTS, ROWS)
    total = gl.max(ends, axis=0) * columns
    steps = inputs // INPUTS
    start, stride, step = _own_tiles(half, steps, TURNS)
    done = 0
    expert, begin, top, count, column = _locate(start, ends, experts, columns, starts_ptr, ROWS)
    for tile in range(start, total, stride):
        following = tile + stride
        if TURNS == 2:
            _await_turn(half, turn, done)
            done += 1
        if top + BEGIN < count:
            acc = gl.zeros([HEIGHT, OUTPUTS], gl.float32, layout)
            acc = _issue(acc, step, ring, BEGIN, HEIGHT, False, STAGES)
            acc = _issue(acc, step + 1, ring, BEGIN, HEIGHT, True, STAGES)
            # Meanwhile: where the results go, and the next tile.
            valid = top + stored_row < count
            place = begin + gl.minimum(top + stored_row, count - 1)
            own_place = begin + gl.minimum(top + own_row, count - 1)
            factor = gl.full([HEIGHT], 1.0, gl.float32, gl.SliceLayout(1, layout))
            first = column * (OUTPUTS if ACTIVATION == "" else WIDTH)
            if ACTIVATION == "":
                place = gl.load(order_ptr + place)
                factor = gl.load(factors_ptr + gl.load(order_ptr + own_place))
                if SCALED:
                    factor *= gl.load(row_scale_ptr + own_place)
                scales = scale_ptr + expert * outputs + first
            else:
                if SCALED:
                    factor = gl.load(row_scale_ptr + gl.load(order_ptr + own_place) // TOP_K)
                scales = scale_ptr + expert * 2 * outputs + first
            expert, begin, top, count, column = _locate(following, ends, experts, columns, starts_ptr, ROWS)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(free.index(step % STAGES), count=1)
            for index in range(2, steps):
                acc = _issue(acc, step + index, ring, BEGIN, HEIGHT, True, STAGES)
                acc = warpgroup_mma_wait(1, deps=[acc])
                # The multiplication before this one has ended.
                mbarrier.arrive(free.index((step + index - 1) % STAGES), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index((step + steps - 1) % STAGES), count=1)
            if TURNS == 2:
                mbarrier.arrive(turn.index(1 - half), count=1)
            if SCALED or ACTIVATION == "":
                acc = acc * factor[:, None]
            left, right = acc.reshape([HEIGHT, 2, WIDTH]).permute((0, 2, 1)).split()
            if SCALED:
                if ACTIVATION == "":
                    left = left * _column_scales(scales, left, outputs - first)
                    right = right * _column_scales(scales + WIDTH, right, outputs - first - WIDTH)
                else:
                    left = left * _column_scales(scales, left, outputs - first)
                    right = right * _column_scales(scales + outputs, right, outputs - first)
            if ACTIVATION == "":
                _store(left, out_ptr, place, valid, first, outputs, stored)
                _store(right, out_ptr, place, valid, first + WIDTH, outputs, stored)
            else:
                _store(_activate(left, ACTIVATION) * right, out_ptr, place, valid, first, outputs, stored)
        else:
            expert, begin, top, count, column = _locate(following, ends, experts, columns, starts_ptr, ROWS)
            _skip(step, steps, ring, STAGES)
        step += TURNS * steps


@gluon.jit
def _multiply_groups(
    half: gl.constexpr, ring, sizes, out, TOP_K: gl.constexpr, EXPERTS: gl.constexpr, ACTIVATION: gl.constexpr,
    ROUNDED: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Do what :func:`_multiply` does, with a scale for each row and the inputs of a step, and one for each block of
    weights.

    The products of a step are multiplied by both and added up in float32 registers, one half of the weights at a
    time; the other compute group keeps the tensor cores busy meanwhile. As DeepGEMM does
    (https://github.com/deepseek-ai/DeepGEMM).
    """
    rows, weights, ready, free, turn = ring
    experts, outputs, inputs, columns = sizes
    out_ptr, order_ptr, starts_ptr, factors_ptr, row_scale_ptr, scale_ptr, out_scale_ptr = out
    ROWS: gl.constexpr = rows.shape[1]
    HEIGHT: gl.constexpr = ROWS * TURNS // 2
    BEGIN: gl.constexpr = half * HEIGHT if TURNS == 1 else 0
    OUTPUTS: gl.constexpr = weights.shape[1]
    WIDTH: gl.constexpr = OUTPUTS // 2
    INPUTS: gl.constexpr = rows.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, INPUTS // 4])
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    own_row = BEGIN + gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
    stored_row = BEGIN + gl.arange(0, HEIGHT, gl.SliceLayout(1, stored))
    ends = _tile_ends(starts_ptr, experts, EXPERTS, ROWS)
    total = gl.max(ends, axis=0) * columns
    steps = inputs // INPUTS
    start, stride, step = _own_tiles(half, steps, TURNS)
    done = 0
    expert, begin, top, count, column = _locate(start, ends, experts, columns, starts_ptr, ROWS)
    for tile in range(start, total, stride):
        following = tile + stride
        if TURNS == 2:
            _await_turn(half, turn, done)
            done += 1
        if top + BEGIN < count:
            own_place = begin + gl.minimum(top + own_row, count - 1)
            if ACTIVATION == "":
                source = own_place
                first = column * OUTPUTS
                block = expert * outputs + first
                # Weights of the second half may not exist; their results are not stored.
                other = gl.minimum(block + WIDTH, experts * outputs - 1)
            else:
                source = gl.load(order_ptr + own_place) // TOP_K
                first = column * WIDTH
                block = expert * 2 * outputs + first
                other = block + outputs
            row_scales = row_scale_ptr + source * steps
            left_scales = scale_ptr + block.to(gl.int64) * steps
            right_scales = scale_ptr + other.to(gl.int64) * steps
            left = gl.zeros([HEIGHT, WIDTH], gl.float32, layout)
            right = gl.zeros([HEIGHT, WIDTH], gl.float32, layout)
            row_scale = gl.load(row_scales)
            left_scale = gl.load(left_scales)
            right_scale = gl.load(right_scales)
            for index in range(steps):
                stage = (step + index) % STAGES
                mbarrier.wait(ready.index(stage), (step + index) // STAGES & 1)
                fence_async_shared()
                x = rows.index(stage).slice(BEGIN, HEIGHT, 0)
                weight = weights.index(stage)
                nothing = gl.zeros([HEIGHT, WIDTH], gl.float32, layout)
                near = weight.slice(0, WIDTH, 0).permute((1, 0))
                products = warpgroup_mma(x, near, nothing, use_acc=False, is_async=True)
                left_factor = row_scale * left_scale
                right_factor = row_scale * right_scale
                # Meanwhile: the scales of the next step; behind the last one its own again.
                ahead = gl.minimum(index + 1, steps - 1)
                row_scale = gl.load(row_scales + ahead)
                left_scale = gl.load(left_scales + ahead)
                right_scale = gl.load(right_scales + ahead)
                products = warpgroup_mma_wait(0, deps=[products])
                left += products * left_factor[:, None]
                far = weight.slice(WIDTH, WIDTH, 0).permute((1, 0))
                products = warpgroup_mma(x, far, nothing, use_acc=False, is_async=True)
                products = warpgroup_mma_wait(0, deps=[products])
                mbarrier.arrive(free.index(stage), count=1)
                right += products * right_factor[:, None]
            if TURNS == 2:
                mbarrier.arrive(turn.index(1 - half), count=1)
            valid = top + stored_row < count
            place = begin + gl.minimum(top + stored_row, count - 1)
            if ACTIVATION == "":
                place = gl.load(order_ptr + place)
                factor = gl.load(factors_ptr + gl.load(order_ptr + own_place))[:, None]
                _store(left * factor, out_ptr, place, valid, first, outputs, stored)
                _store(right * factor, out_ptr, place, valid, first + WIDTH, outputs, stored)
            else:
                result = _activate(left, ACTIVATION) * right
                if ROUNDED:
                    # As if the results had been stored in 16 bits before.
                    result = result.to(gl.bfloat16).to(gl.float32)
                    out_scale = _scale_of_row(gl.max(gl.abs(result), axis=1))
                    result *= (1.0 / out_scale)[:, None]
                    own = out_scale_ptr + own_place * columns + column
                    gl.store(own, out_scale, mask=top + own_row < count)
                _store(result, out_ptr, place, valid, first, outputs, stored)
        else:
            _skip(step, steps, ring, STAGES)
        expert, begin, top, count, column = _locate(following, ends, experts, columns, starts_ptr, ROWS)
        step += TURNS * steps


@gluon.jit
def _own_tiles(half: gl.constexpr, steps, TURNS: gl.constexpr):
    """Return a compute group's first tile, the distance to its next one, and the first step of its first tile."""
    number: gl.constexpr = half if TURNS == 2 else 0
    return gl.program_id(0) + number * gl.num_programs(0), TURNS * gl.num_programs(0), number * steps


@gluon.jit
def _await_turn(half: gl.constexpr, turn, done):
    """Wait until it is this group's turn; ``done``: how many tiles it has had.

    A group that skips a tile's steps must not look at their barriers before the group before it is past them.
    """
    mbarrier.wait(turn.index(half), (done & 1) ^ (1 - half))


@gluon.jit
def _skip(step, steps, ring, STAGES: gl.constexpr):
    """Free the steps of a tile that has no rows for this group."""
    _, _, ready, free, _ = ring
    for index in range(steps):
        stage = (step + index) % STAGES
        mbarrier.wait(ready.index(stage), (step + index) // STAGES & 1)
        mbarrier.arrive(free.index(stage), count=1)


@gluon.jit
def _issue(
    acc, step, ring, BEGIN: gl.constexpr, HEIGHT: gl.constexpr, USE_ACC: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Start to add the products of a step with HEIGHT rows from BEGIN on to ``acc``."""
    rows, weights, ready, _, _ = ring
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), step // STAGES & 1)
    # Tensor cores read shared memory through the async proxy, which does not see plain copies without a fence.
    fence_async_shared()
    x = rows.index(stage).slice(BEGIN, HEIGHT, 0)
    return warpgroup_mma(x, weights.index(stage).permute((1, 0)), acc, use_acc=USE_ACC, is_async=True)


@gluon.jit
def _column_scales(scales, like, left):
    """Load the scales of the columns of ``like``, of which ``left`` exist, as a row."""
    column = gl.arange(0, like.shape[1], gl.SliceLayout(0, like.type.layout))
    return gl.load(scales + column, mask=column < left, other=0.0)[None, :]


@gluon.jit
def _store(result, out_ptr, place, valid, first, outputs, layout: gl.constexpr):
    """Store rows of results from output ``first`` on."""
    result = gl.convert_layout(result.to(out_ptr.dtype.element_ty), layout)
    output = first + gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))
    mask = valid[:, None] & (output < outputs)[None, :]
    gl.store(out_ptr + (place.to(gl.int64) * outputs)[:, None] + output[None, :], result, mask=mask)
