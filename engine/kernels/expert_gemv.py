"""The MLPs of a mixture of experts for few tokens.

With fewer pairs of tokens and experts than experts, nearly every pair reads matrices of its own: each is a
GEMV, bound by memory, see :mod:`engine.kernels.gemv`. Two launches compute a layer, without sorting. Which
weights are read is known only once the router has chosen, so nothing can be prefetched. A program adds up all
experts of a token, and issues their loads of a step at once.
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
from engine.kernels.scales import load_scales, scale_arguments

#: With more steps over the inputs they are a loop.
MAX_STEPS = 8


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """Outputs per program, inputs per step, and warps of a program."""

    outputs: int
    inputs: int
    warps: int


def choose_tile(inputs: int, rows: int, itemsize: int) -> ExpertTile:
    """Choose the tile of a program that reads ``rows`` weight rows for each output.

    Of some thirty tiles it is the best or within 1 % of it on an H200 for 8 of 128 experts of 2048 by 768 and
    one token, by the time of a chain of layers: two rows (gate) and eight rows (down) of 16-bit and fp8 weights.

    Args:
        itemsize: bytes of a weight.
    """
    if rows == 2:
        # One warp an output: nothing has to be exchanged between warps.
        tile = ExpertTile(outputs=1, inputs=512, warps=1)
    else:
        tile = ExpertTile(outputs=2 if itemsize == 1 else 1, inputs=max(16, 1024 // rows), warps=4)
    return replace(tile, inputs=min(tile.inputs, triton.next_power_of_2(inputs)))


def _tile_arguments(tile: ExpertTile, outputs: int, inputs: int) -> dict[str, Any]:
    steps = triton.cdiv(inputs, tile.inputs)
    return {
        "TILE_OUTPUTS": tile.outputs, "TILE_INPUTS": tile.inputs, "STEPS": steps if steps <= MAX_STEPS else 0,
        "EVEN": inputs % tile.inputs == 0 and outputs % tile.outputs == 0, "num_warps": tile.warps,
    }  # fmt: skip


def expert_gemv_triton(x, ids, weights, gate_up: ExpertMatrices, down: ExpertMatrices, activation):
    """See :func:`engine.kernels.dispatch.experts`."""
    tokens, top_k = ids.shape
    width, inner_width = x.shape[1], down.weight.shape[2]
    assert x.stride(1) == 1 and ids.is_contiguous() and weights.is_contiguous()
    assert gate_up.weight.is_contiguous() and down.weight.is_contiguous()
    inner = torch.empty((tokens * top_k, inner_width), dtype=x.dtype, device=x.device)
    tile = choose_tile(width, 2, gate_up.weight.element_size())
    launch(
        _expert_gate_kernel, (triton.cdiv(inner_width, tile.outputs), tokens * top_k),
        x_ptr=x, weight_ptr=gate_up.weight, ids_ptr=ids, out_ptr=inner, outputs=inner_width, inputs=width,
        x_stride=x.stride(0), **scale_arguments(x, gate_up.scale), TOP_K=top_k, ACTIVATION=activation,
        **_tile_arguments(tile, inner_width, width), **pdl_options(x),
    )  # fmt: skip
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    pairs = triton.next_power_of_2(top_k)
    tile = choose_tile(inner_width, pairs, down.weight.element_size())
    launch(
        _expert_down_kernel, (triton.cdiv(width, tile.outputs), tokens),
        inner_ptr=inner, weight_ptr=down.weight, ids_ptr=ids, factors_ptr=weights, out_ptr=out,
        outputs=width, inputs=inner_width, **scale_arguments(x, down.scale), TOP_K=top_k, PAIRS=pairs,
        **_tile_arguments(tile, width, inner_width), **pdl_options(x),
    )  # fmt: skip
    return out


@triton.jit
def _add_products(
    sums, x_row, weight_ptr, row, row_mask, k, inputs, scale_ptr, groups, GROUP: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Add to ``sums`` the products of inputs ``k`` of weight rows ``row`` with ``x_row``, times the scales of groups.

    The tile has three axes, of which inputs are the last. ``k`` has the tile's shape, so that inputs are loaded
    from the cache for every row by themselves, see :mod:`engine.kernels.gemv`; the rest broadcasts to it.
    """
    mask = row_mask & (k < inputs)
    if EVEN:
        weight = tl.load(weight_ptr + row * inputs + k)
        x = tl.load(x_row + k)
    else:
        weight = tl.load(weight_ptr + row * inputs + k, mask=mask, other=0.0)
        x = tl.load(x_row + k, mask=mask, other=0.0)
    products = weight.to(tl.float32) * x.to(tl.float32)
    if GROUP > 0:
        products *= load_scales(scale_ptr, row, groups, k // GROUP, mask)
    return sums + products


@triton.jit
def _sum_products(
    sums, x_row, weight_ptr, row, row_mask, inputs, scale_ptr, groups,
    GROUP: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Add all inputs to ``sums`` ``(rows, TILE_OUTPUTS, TILE_INPUTS)``."""
    TILE_INPUTS: tl.constexpr = sums.shape[2]
    lane = tl.zeros([sums.shape[0], sums.shape[1], 1], tl.int32) + tl.arange(0, TILE_INPUTS)[None, None, :]
    if STEPS > 0:
        # Known steps: the loads of several are issued before the first one's products.
        for step in tl.static_range(STEPS):
            sums = _add_products(
                sums, x_row, weight_ptr, row, row_mask, step * TILE_INPUTS + lane, inputs, scale_ptr, groups,
                GROUP, EVEN,
            )  # fmt: skip
    else:
        for first in range(0, inputs, TILE_INPUTS):
            sums = _add_products(
                sums, x_row, weight_ptr, row, row_mask, first + lane, inputs, scale_ptr, groups, GROUP, EVEN
            )
    return sums


@triton.jit
def _row_scales(scale_ptr, row, row_mask, GROUP: tl.constexpr):
    """Load the factors of whole weight rows: their scales, or 1."""
    factors = tl.full(row.shape, 1.0, tl.float32)
    if GROUP == 0:
        factors = tl.load(scale_ptr + row, mask=row_mask, other=0.0)
    return factors


@triton.jit
def _expert_gate_kernel(
    x_ptr, weight_ptr, ids_ptr, out_ptr, outputs, inputs, x_stride, scale_ptr, groups,
    GROUP: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per pair and tile of outputs: the gate's activation times the other half of the outputs.

    The axes of its tile are halves, outputs and inputs.
    """
    wait_for_previous(PDL)
    pair = tl.program_id(1)
    half = tl.arange(0, 2)[:, None, None]
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    mask = (output < outputs)[None, :, None] & (half < 2)
    row = (tl.load(ids_ptr + pair).to(tl.int64) * 2 + half) * outputs + output[None, :, None]
    x_row = x_ptr + (pair // TOP_K).to(tl.int64) * x_stride
    products = tl.zeros([2, TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    products = _sum_products(
        products, x_row, weight_ptr, row, mask, inputs, scale_ptr, groups, GROUP, EVEN, STEPS
    )
    sums = tl.sum(products, axis=2, keep_dims=True) * _row_scales(scale_ptr, row, mask, GROUP)
    gate = tl.sum(tl.sum(tl.where(half == 0, sums, 0.0), axis=2), axis=0)
    up = tl.sum(tl.sum(tl.where(half == 1, sums, 0.0), axis=2), axis=0)
    result = (activate(gate, ACTIVATION) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pair.to(tl.int64) * outputs + output, result, mask=output < outputs)


@triton.jit
def _expert_down_kernel(
    inner_ptr, weight_ptr, ids_ptr, factors_ptr, out_ptr, outputs, inputs, scale_ptr, groups,
    GROUP: tl.constexpr, TOP_K: tl.constexpr, PAIRS: tl.constexpr, TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and tile of outputs; it sums over the token's experts.

    The axes of its tile are the token's pairs, outputs and inputs.
    """
    wait_for_previous(PDL)
    token = tl.program_id(1)
    index = tl.arange(0, PAIRS)[:, None, None]
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    known = index < TOP_K
    mask = known & (output < outputs)[None, :, None]
    pair = token * TOP_K + index
    expert = tl.load(ids_ptr + pair, mask=known, other=0)
    factor = tl.load(factors_ptr + pair, mask=known, other=0.0)
    row = expert.to(tl.int64) * outputs + output[None, :, None]
    inner_row = inner_ptr + pair.to(tl.int64) * inputs
    products = tl.zeros([PAIRS, TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    products = _sum_products(
        products,
        inner_row,
        weight_ptr,
        row,
        mask,
        inputs,
        scale_ptr,
        groups,
        GROUP,
        EVEN and PAIRS == TOP_K,
        STEPS,
    )
    sums = tl.sum(products, axis=2, keep_dims=True) * _row_scales(scale_ptr, row, mask, GROUP) * factor
    result = tl.sum(tl.sum(sums, axis=2), axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * outputs + output, result, mask=output < outputs)
