"""The MLPs of a mixture of experts for many tokens: GEMMs over the rows of each expert, in one launch.

Pairs of tokens and experts are sorted by expert. A tile of rows belongs to one expert; tiles are found as
query tiles of attention are (:func:`engine.kernels.paged.find_tile`), so the grid depends on the number of
pairs alone. As in :mod:`engine.kernels.skinny_gemm`, weights are the left operand of the tensor cores: an
expert often has fewer rows than the 64 that the left operand must have on Hopper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.device import shared_memory
from engine.kernels.expert_groups import experts_in_groups
from engine.kernels.experts import ExpertMatrices
from engine.kernels.launch import is_compiling, launch
from engine.kernels.paged import find_tile, query_tiles
from engine.kernels.scales import scale_arguments


@dataclass(frozen=True, slots=True)
class GroupedTile:
    """Rows, outputs and inputs of a tile, warps of a program, and depth of its pipeline over inputs."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


#: Rows of a tile.
HEIGHTS = (16, 64, 128)


def choose_height(pairs: int, experts: int) -> int:
    """Choose the rows of a tile by the mean number of rows of an expert."""
    mean = pairs / experts
    return next((rows for rows in HEIGHTS if mean <= rows), HEIGHTS[-1])


def choose_tile(
    rows: int, inputs: int, *, gated: bool, grouped: bool, itemsize: int, memory: int
) -> GroupedTile:
    """Choose the tile of ``rows`` rows.

    Of some dozens it is the best or within 2 % of it on an H200 for 128 experts of 2048 by 768 in bfloat16,
    with 4, 64 and 512 rows an expert.

    Args:
        grouped: groups of inputs have scales; sums of a group need registers of their own.
        itemsize: bytes of an element.
        memory: bytes of shared memory that a program may use.
    """
    outputs = 128
    if rows == 128 and gated == grouped:
        outputs = 64 if gated else 256
    width = 128 if rows == 16 else 64
    stages = 3 if rows == 16 else 4
    width = max(16, min(width, triton.next_power_of_2(inputs)))
    stage_bytes = ((2 if gated else 1) * outputs + rows) * width * itemsize
    stages = max(1, min(stages, memory // stage_bytes))
    return GroupedTile(rows, outputs, width, 8 if rows == 128 else 4, stages)


def grouped_experts_triton(x, ids, weights, gate_up: ExpertMatrices, down: ExpertMatrices, activation):
    """See :func:`engine.kernels.dispatch.experts`."""
    height = choose_height(ids.numel(), len(gate_up.weight))
    # When compiling ahead of time, compile the kernels for other numbers of tokens too.
    for rows in HEIGHTS if is_compiling() else (height,):
        gemm = partial(_grouped_gemm, rows=rows)
        out = experts_in_groups(gemm, x, ids, weights, gate_up, down, activation)
    return out


def _grouped_gemm(x, matrices, out, order, starts, *, rows, activation=None, factors=None, top_k=1):
    """See :class:`~engine.kernels.expert_groups.GroupedGemm`. ``rows``: of a tile."""
    experts, outputs, inputs = matrices.weight.shape
    gated = activation is not None
    outputs = outputs // 2 if gated else outputs
    assert matrices.weight.is_contiguous() and out.shape == (len(order), outputs)
    scales = scale_arguments(x, matrices.scale)
    memory = shared_memory(x.device)
    grouped = scales["GROUP"] > 0
    tile = choose_tile(rows, inputs, gated=gated, grouped=grouped, itemsize=x.element_size(), memory=memory)
    # All inputs of a step have one scale.
    width = min(tile.inputs, scales["GROUP"]) if grouped else tile.inputs
    launch(
        _grouped_gemm_kernel,
        (triton.cdiv(outputs, tile.outputs), query_tiles(len(order), experts, tile.rows)),
        x_ptr=x, weight_ptr=matrices.weight, out_ptr=out, order_ptr=order, starts_ptr=starts,
        factors_ptr=x if factors is None else factors, experts=experts, outputs=outputs, inputs=inputs,
        x_stride=x.stride(0), **scales, TOP_K=top_k, ROWS=tile.rows, TILE_OUTPUTS=tile.outputs,
        TILE_INPUTS=width, STAGES=tile.stages, EVEN=inputs % width == 0, ACTIVATION=activation or "",
        num_warps=tile.warps,
    )  # fmt: skip


@triton.jit
def _add_products(
    acc, weights, xs, k, lane, inputs, scale_ptr, row, groups, GROUP: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Add the products of a tile of weights, times their scales, with the rows to ``acc``."""
    if EVEN:
        weight = tl.load(weights + k)
        x = tl.load(xs + k)
    else:
        weight = tl.load(weights + k, mask=(k + lane < inputs)[None, :], other=0.0)
        x = tl.load(xs + k, mask=(k + lane < inputs)[:, None], other=0.0)
    if GROUP > 0:
        scale = tl.load(scale_ptr + row * groups + k // GROUP)
        acc += tl.dot(weight.to(x.dtype), x, input_precision="ieee") * scale[:, None]
    else:
        acc = tl.dot(weight.to(x.dtype), x, acc, input_precision="ieee")
    return acc


@triton.jit
def _grouped_gemm_kernel(
    x_ptr, weight_ptr, out_ptr, order_ptr, starts_ptr, factors_ptr, experts, outputs, inputs, x_stride,
    scale_ptr, groups, GROUP: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per tile of outputs and tile of rows of one expert."""
    expert, begin, first, count, _ = find_tile(starts_ptr, starts_ptr, tl.program_id(1), experts, ROWS)
    if first >= count:
        return
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = first + tl.arange(0, ROWS)
    lane = tl.arange(0, TILE_INPUTS)
    # Lanes beyond the last output or row load the last one again; their results are not stored.
    place = begin + tl.minimum(row, count - 1)
    known = tl.minimum(output, outputs - 1)
    source = place
    target = place
    pair = tl.load(order_ptr + place)
    if ACTIVATION != "":
        source = pair // TOP_K
        known = tl.cast(expert, tl.int64) * 2 * outputs + known
    else:
        target = pair
        known = tl.cast(expert, tl.int64) * outputs + known
    weights = weight_ptr + known[:, None] * inputs + lane[None, :]
    ups = weights + tl.cast(outputs, tl.int64) * inputs
    xs = x_ptr + source.to(tl.int64)[None, :] * x_stride + lane[:, None]
    acc = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    for k in tl.range(0, inputs, TILE_INPUTS, num_stages=STAGES):
        acc = _add_products(acc, weights, xs, k, lane, inputs, scale_ptr, known, groups, GROUP, EVEN)
        if ACTIVATION != "":
            up = _add_products(up, ups, xs, k, lane, inputs, scale_ptr, known + outputs, groups, GROUP, EVEN)
    if GROUP == 0:
        acc *= tl.load(scale_ptr + known)[:, None]
        if ACTIVATION != "":
            up *= tl.load(scale_ptr + known + outputs)[:, None]
    if ACTIVATION != "":
        acc = activate(acc, ACTIVATION) * up
    else:
        acc *= tl.load(factors_ptr + pair)[None, :]
    mask = (output < outputs)[:, None] & (row < count)[None, :]
    offset = target.to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
