"""The MLPs of a mixture of experts for few tokens.

With fewer pairs of tokens and experts than experts, nearly every pair reads matrices of its own: each is a
GEMV, bound by memory, see :mod:`engine.kernels.gemv`. Two launches compute a layer, without sorting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.experts import ExpertMatrices
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.scales import load_scales, scale_arguments

#: Outputs per program, inputs per step and warps.
_OUTPUTS, _INPUTS, _WARPS = 2, 512, 4


def expert_gemv_triton(x, ids, weights, gate_up: ExpertMatrices, down: ExpertMatrices, activation):
    """See :func:`engine.kernels.dispatch.experts`."""
    tokens, top_k = ids.shape
    width, inner_width = x.shape[1], down.weight.shape[2]
    assert x.stride(1) == 1 and ids.is_contiguous() and weights.is_contiguous()
    assert gate_up.weight.is_contiguous() and down.weight.is_contiguous()
    inner = torch.empty((tokens * top_k, inner_width), dtype=x.dtype, device=x.device)
    launch(
        _expert_gate_kernel, (triton.cdiv(inner_width, _OUTPUTS), tokens * top_k),
        x_ptr=x, weight_ptr=gate_up.weight, ids_ptr=ids, out_ptr=inner, outputs=inner_width, inputs=width,
        x_stride=x.stride(0), **scale_arguments(x, gate_up.scale), TOP_K=top_k, ACTIVATION=activation,
        **_tile(width), **pdl_options(x),
    )  # fmt: skip
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    launch(
        _expert_down_kernel, (triton.cdiv(width, _OUTPUTS), tokens),
        inner_ptr=inner, weight_ptr=down.weight, ids_ptr=ids, factors_ptr=weights, out_ptr=out,
        outputs=width, inputs=inner_width, **scale_arguments(x, down.scale), TOP_K=top_k,
        **_tile(inner_width), **pdl_options(x),
    )  # fmt: skip
    return out


def _tile(inputs: int) -> dict[str, int]:
    width = min(_INPUTS, triton.next_power_of_2(inputs))
    return {"TILE_OUTPUTS": _OUTPUTS, "TILE_INPUTS": width, "num_warps": _WARPS}


@triton.jit
def _products(x_ptr, weight_ptr, row, row_mask, k, inputs, scale_ptr, groups, GROUP: tl.constexpr):
    """Products of inputs ``k`` of ``x`` with those of weight rows ``row``, times their scales; float32."""
    mask = row_mask[:, None] & (k < inputs)[None, :]
    weight = tl.load(weight_ptr + row[:, None] * inputs + k[None, :], mask=mask, other=0.0)
    x = tl.load(x_ptr + k, mask=k < inputs, other=0.0).to(tl.float32)
    products = weight.to(tl.float32) * x[None, :]
    if GROUP > 0:
        products *= load_scales(scale_ptr, row[:, None], groups, (k // GROUP)[None, :], mask)
    if GROUP == 0:
        products *= tl.load(scale_ptr + row, mask=row_mask, other=0.0)[:, None]
    return products


@triton.jit
def _expert_gate_kernel(
    x_ptr, weight_ptr, ids_ptr, out_ptr, outputs, inputs, x_stride, scale_ptr, groups,
    GROUP: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per pair and tile of outputs: the gate's activation times the other half of the outputs."""
    wait_for_previous(PDL)
    pair = tl.program_id(1)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    mask = output < outputs
    row = tl.load(ids_ptr + pair).to(tl.int64) * 2 * outputs + output
    x_row = x_ptr + (pair // TOP_K).to(tl.int64) * x_stride
    lane = tl.arange(0, TILE_INPUTS)
    gate = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    up = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    for first in range(0, inputs, TILE_INPUTS):
        k = first + lane
        gate += _products(x_row, weight_ptr, row, mask, k, inputs, scale_ptr, groups, GROUP)
        up += _products(x_row, weight_ptr, row + outputs, mask, k, inputs, scale_ptr, groups, GROUP)
    result = activate(tl.sum(gate, axis=1), ACTIVATION) * tl.sum(up, axis=1)
    tl.store(out_ptr + pair.to(tl.int64) * outputs + output, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expert_down_kernel(
    inner_ptr, weight_ptr, ids_ptr, factors_ptr, out_ptr, outputs, inputs, scale_ptr, groups,
    GROUP: tl.constexpr, TOP_K: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_INPUTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and tile of outputs; it sums over the token's experts."""
    wait_for_previous(PDL)
    token = tl.program_id(1)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    mask = output < outputs
    lane = tl.arange(0, TILE_INPUTS)
    sums = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    for index in range(TOP_K):
        pair = token * TOP_K + index
        row = tl.load(ids_ptr + pair).to(tl.int64) * outputs + output
        factor = tl.load(factors_ptr + pair)
        inner_row = inner_ptr + pair.to(tl.int64) * inputs
        for first in range(0, inputs, TILE_INPUTS):
            products = _products(
                inner_row, weight_ptr, row, mask, first + lane, inputs, scale_ptr, groups, GROUP
            )
            sums += products * factor
    result = tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * outputs + output, result, mask=mask)
