"""The MLPs of a mixture of experts for few tokens.

With fewer pairs of tokens and experts than experts, nearly every pair reads matrices of its own: each is a
GEMV, bound by memory, see :mod:`engine.kernels.gemv`. Two launches compute a layer, without sorting. Each program
chooses its token's experts itself, which takes less than a launch. The first kernel knows no weights before the
logits; the second one loads weights while the first still runs. Its programs add up all experts of a token, and
issue their loads of a step at once. The weights are read once: they are the first to leave the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.experts import ExpertMatrices
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.route import Routing, choose_expert, choose_experts
from engine.kernels.scales import load_scales, scale_arguments

#: With more steps over the inputs they are a loop.
MAX_STEPS = 8


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """How a program multiplies.

    Attributes:
        outputs: at a time.
        inputs: per step.
        warps: of a program.
        ready: steps whose weights it loads in advance.
        share: tiles of outputs that a program of the first kernel computes, one after the other.
    """

    outputs: int
    inputs: int
    warps: int
    ready: int = 0
    share: int = 1


def choose_tile(inputs: int, rows: int, itemsize: int, *, grouped: bool) -> ExpertTile:
    """Choose the tile of a program that reads ``rows`` weight rows for each output.

    Of some thirty tiles it is the best or within 2 % of it on an H200 for 8 of 128 experts of 2048 by 768 and
    one token, by the time of whole decoder layers: two rows (gate) and eight rows (down) of 16-bit and fp8 weights.

    Args:
        itemsize: bytes of a weight.
        grouped: groups of inputs have scales.
    """
    if rows == 2:
        # One warp an output: nothing has to be exchanged between warps.
        tile = ExpertTile(outputs=1, inputs=256 if grouped else 2048, warps=1)
        if itemsize == 1 and not grouped:
            # All weights of an output at once, and those of a second one, since choosing experts takes time too.
            tile = replace(tile, ready=1, share=2)
    else:
        # With more in advance, fewer programs would fit beside those of the kernel before.
        tile = ExpertTile(outputs=2, inputs=max(16, 1024 // rows), warps=2, ready=3 if itemsize == 1 else 2)
        if itemsize == 1 and not grouped:
            tile = ExpertTile(outputs=1, inputs=max(16, 2048 // rows), warps=1, ready=3)
    return replace(tile, inputs=min(tile.inputs, triton.next_power_of_2(inputs)))


def _tile_arguments(tile: ExpertTile, outputs: int, inputs: int) -> dict[str, Any]:
    steps = triton.cdiv(inputs, tile.inputs)
    return {
        "TILE_OUTPUTS": tile.outputs, "TILE_INPUTS": tile.inputs, "STEPS": steps if steps <= MAX_STEPS else 0,
        "EVEN": inputs % tile.inputs == 0 and outputs % (tile.outputs * tile.share) == 0, "num_warps": tile.warps,
    }  # fmt: skip


def expert_gemv_triton(x, routing: Routing, gate_up: ExpertMatrices, down: ExpertMatrices, activation):
    """See :func:`engine.kernels.dispatch.experts`."""
    tokens, top_k = len(x), routing.config.top_k
    width, inner_width = x.shape[1], down.weight.shape[2]
    assert x.stride(1) == 1 and gate_up.weight.is_contiguous() and down.weight.is_contiguous()
    inner = torch.empty((tokens * top_k, inner_width), dtype=x.dtype, device=x.device)
    scales = scale_arguments(x, gate_up.scale)
    tile = choose_tile(width, 2, gate_up.weight.element_size(), grouped=scales["GROUP"] > 0)
    launch(
        _expert_gate_kernel, (triton.cdiv(inner_width, tile.outputs * tile.share), tokens * top_k),
        x_ptr=x, weight_ptr=gate_up.weight, out_ptr=inner, outputs=inner_width, inputs=width,
        x_stride=x.stride(0), **routing.arguments(), **scales, ACTIVATION=activation, READY=tile.ready,
        SHARE=tile.share,
        **_tile_arguments(tile, inner_width, width), **pdl_options(x),
    )  # fmt: skip
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    scales, rows = scale_arguments(x, down.scale), triton.next_power_of_2(top_k)
    tile = choose_tile(inner_width, rows, down.weight.element_size(), grouped=scales["GROUP"] > 0)
    launch(
        _expert_down_kernel, (triton.cdiv(width, tile.outputs), tokens),
        inner_ptr=inner, weight_ptr=down.weight, out_ptr=out, outputs=width, inputs=inner_width,
        **routing.arguments(), **scales, READY=tile.ready,
        **_tile_arguments(tile, width, inner_width), **pdl_options(x),
    )  # fmt: skip
    return out


@triton.jit
def _lanes(ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, GROUP: tl.constexpr):
    """Inputs of a tile of the first step. Its axes are rows, outputs, groups of inputs and inputs of a group."""
    WIDTH: tl.constexpr = min(GROUP, TILE_INPUTS) if GROUP > 0 else TILE_INPUTS
    group = tl.arange(0, TILE_INPUTS // WIDTH)[None, None, :, None] * WIDTH
    return tl.zeros([ROWS, OUTPUTS, 1, 1], tl.int32) + group + tl.arange(0, WIDTH)[None, None, None, :]


@triton.jit
def _load_weights(weight_ptr, row, row_mask, k, inputs, EVEN: tl.constexpr):
    """Load inputs ``k`` of weight rows ``row``."""
    if EVEN:
        return tl.load(weight_ptr + row * inputs + k, eviction_policy="evict_first")
    mask = row_mask & (k < inputs)
    return tl.load(weight_ptr + row * inputs + k, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _products(
    weight, x_row, row, row_mask, first, lane, inputs, scale_ptr, groups, GROUP: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Products of inputs from ``first`` on of weight rows ``row`` with ``x_row``, times the scales of groups.

    ``lane`` has the tile's shape, so that inputs are loaded from the cache for every row by themselves, see
    :mod:`engine.kernels.gemv`; the rest broadcasts to it.
    """
    k = first + lane
    if EVEN:
        x = tl.load(x_row + k)
    else:
        x = tl.load(x_row + k, mask=row_mask & (k < inputs), other=0.0)
    products = weight.to(tl.float32) * x.to(tl.float32)
    if GROUP > 0:
        # One for each group, not for each input.
        WIDTH: tl.constexpr = lane.shape[3]
        begin = first + tl.arange(0, lane.shape[2])[None, None, :, None] * WIDTH
        products *= load_scales(scale_ptr, row, groups, begin // GROUP, row_mask & (begin < inputs))
    return products


@triton.jit
def _sum_products(
    ready, x_row, weight_ptr, row, row_mask, lane, inputs, scale_ptr, groups,
    GROUP: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sum up products of weight rows over steps, in the shape of ``lane``. ``ready``: the weights of the first steps."""
    TILE_INPUTS: tl.constexpr = lane.shape[2] * lane.shape[3]
    sums = tl.zeros(lane.shape, tl.float32)
    if STEPS > 0:
        # Known steps: the loads of several are issued before the first one's products.
        for step in tl.static_range(STEPS):
            if step < len(ready):
                weight = ready[step]
            else:
                weight = _load_weights(weight_ptr, row, row_mask, step * TILE_INPUTS + lane, inputs, EVEN)
            sums += _products(
                weight, x_row, row, row_mask, step * TILE_INPUTS, lane, inputs, scale_ptr, groups, GROUP, EVEN
            )
    else:
        for first in range(0, inputs, TILE_INPUTS):
            weight = _load_weights(weight_ptr, row, row_mask, first + lane, inputs, False)
            sums += _products(
                weight, x_row, row, row_mask, first, lane, inputs, scale_ptr, groups, GROUP, False
            )
    return sums


@triton.jit
def _sum_inputs(sums):
    """Sum up the inputs of weight rows, ``(rows, outputs, 1, 1)``."""
    return tl.sum(tl.sum(sums, axis=3, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _load_steps(weight_ptr, row, row_mask, lane, inputs, EVEN: tl.constexpr, STEPS: tl.constexpr):
    """Load the weights of the first STEPS steps."""
    TILE_INPUTS: tl.constexpr = lane.shape[2] * lane.shape[3]
    loaded = ()
    for step in tl.static_range(STEPS):
        loaded = loaded + (_load_weights(weight_ptr, row, row_mask, step * TILE_INPUTS + lane, inputs, EVEN),)
    return loaded


@triton.jit
def _load_ahead(weight_ptr, row, row_mask, lane, inputs, EVEN: tl.constexpr, STEPS: tl.constexpr):
    """Do what :func:`_load_steps` does, and have the loads issued here: the compiler would issue each one when its
    products are next."""
    loaded = _load_steps(weight_ptr, row, row_mask, lane, inputs, EVEN, STEPS)
    if STEPS > 0:
        tl.debug_barrier()
    return loaded


@triton.jit
def _row_scales(scale_ptr, row, row_mask, GROUP: tl.constexpr):
    """Load the factors of whole weight rows: their scales, or 1."""
    factors = tl.full(row.shape, 1.0, tl.float32)
    if GROUP == 0:
        factors = tl.load(scale_ptr + row, mask=row_mask, other=0.0)
    return factors


@triton.jit
def _sum_rows(sums):
    """Sum up the rows of each output."""
    return tl.sum(tl.sum(tl.sum(sums, axis=3), axis=2), axis=0)


@triton.jit
def _expert_gate_kernel(
    x_ptr, weight_ptr, out_ptr, outputs, inputs, x_stride, logits_ptr, bias_ptr, scaling, scale_ptr, groups,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr, READY: tl.constexpr, SHARE: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per pair and SHARE tiles of outputs: the gate's activation times the other half of the outputs.

    The rows of its tile are the two halves.
    """
    pair = tl.program_id(1)
    half = tl.arange(0, 2)[:, None, None, None]
    first = tl.program_id(0) * (SHARE * TILE_OUTPUTS) + tl.arange(0, TILE_OUTPUTS)
    lane = _lanes(2, TILE_OUTPUTS, TILE_INPUTS, GROUP)
    wait_for_previous(PDL)
    expert = choose_expert(
        logits_ptr + (pair // TOP_K).to(tl.int64) * (GROUPS * GROUP_SIZE), bias_ptr, pair % TOP_K,
        GROUPS, GROUP_SIZE, TOP_GROUPS, SIGMOID, BIAS,
    )  # fmt: skip
    x_row = x_ptr + (pair // TOP_K).to(tl.int64) * x_stride
    output = first
    mask = (output < outputs)[None, :, None, None] & (half < 2)
    row = (expert.to(tl.int64) * 2 + half) * outputs + output[None, :, None, None]
    ready = _load_ahead(weight_ptr, row, mask, lane, inputs, EVEN, min(READY, STEPS))
    for part in tl.static_range(SHARE):
        sums = _sum_products(
            ready, x_row, weight_ptr, row, mask, lane, inputs, scale_ptr, groups, GROUP, EVEN, STEPS
        )
        scales = _row_scales(scale_ptr, row, mask, GROUP)
        here = output
        if part + 1 < SHARE:
            output = first + (part + 1) * TILE_OUTPUTS
            mask = (output < outputs)[None, :, None, None] & (half < 2)
            row = (expert.to(tl.int64) * 2 + half) * outputs + output[None, :, None, None]
            ready = _load_ahead(weight_ptr, row, mask, lane, inputs, EVEN, min(READY, STEPS))
        sums = _sum_inputs(sums) * scales
        gate = _sum_rows(tl.where(half == 0, sums, 0.0))
        up = _sum_rows(tl.where(half == 1, sums, 0.0))
        result = (activate(gate, ACTIVATION) * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + pair.to(tl.int64) * outputs + here, result, mask=here < outputs)


@triton.jit
def _expert_down_kernel(
    inner_ptr, weight_ptr, out_ptr, outputs, inputs, logits_ptr, bias_ptr, scaling, scale_ptr, groups,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
    GROUP: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, STEPS: tl.constexpr,
    READY: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and tile of outputs; it sums over the token's experts.

    The rows of its tile are the token's pairs. The logits are older than the previous kernel, so weights are
    loaded before that one has ended.
    """
    PAIRS: tl.constexpr = triton.next_power_of_2(TOP_K)
    ALL: tl.constexpr = EVEN and PAIRS == TOP_K
    token = tl.program_id(1)
    expert, factor = choose_experts(
        logits_ptr + token.to(tl.int64) * (GROUPS * GROUP_SIZE), bias_ptr, scaling,
        GROUPS, GROUP_SIZE, TOP_GROUPS, TOP_K, SIGMOID, BIAS, RENORMALISE,
    )  # fmt: skip
    index = tl.arange(0, PAIRS)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    mask = (index < TOP_K)[:, None, None, None] & (output < outputs)[None, :, None, None]
    row = expert.to(tl.int64)[:, None, None, None] * outputs + output[None, :, None, None]
    lane = _lanes(PAIRS, TILE_OUTPUTS, TILE_INPUTS, GROUP)
    ready = _load_steps(weight_ptr, row, mask, lane, inputs, ALL, min(READY, STEPS))
    factor = factor[:, None, None, None] * _row_scales(scale_ptr, row, mask, GROUP)
    wait_for_previous(PDL)
    inner_row = inner_ptr + (token * TOP_K + index).to(tl.int64)[:, None, None, None] * inputs
    sums = _sum_products(
        ready, inner_row, weight_ptr, row, mask, lane, inputs, scale_ptr, groups, GROUP, ALL, STEPS
    )
    result = _sum_rows(_sum_inputs(sums) * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * outputs + output, result, mask=output < outputs)
