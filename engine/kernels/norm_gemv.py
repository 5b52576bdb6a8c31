"""GEMV with the RMS norm before it and the gate after it, in one launch.

It is memory-bound, see :mod:`engine.kernels.gemv`. Each program normalises the row itself, keeps it in
registers and multiplies its share of the weight rows by it. There are as many programs as the GPU runs at a
time, so each normalises only once, and loads its first weights meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.act_mul import act_mul_reference
from engine.kernels.activation import activate
from engine.kernels.device import num_sms
from engine.kernels.launch import launch
from engine.kernels.pdl import launch_dependents, pdl_options, wait_for_previous
from engine.kernels.rms_norm import rms_norm_reference
from engine.kernels.scales import load_scales, scale_arguments


def norm_linear_reference(x, residual, norm, eps, weight, bias=None, *, activation=None, offset=0.0):
    """Compute :func:`~engine.kernels.dispatch.norm_linear` in torch; every operation rounds its result."""
    total = x if residual is None else x + residual
    out = F.linear(rms_norm_reference(total, norm, eps, offset=offset), weight, bias)
    return out if activation is None else act_mul_reference(out, activation), total


@dataclass(frozen=True, slots=True)
class NormGemvTile:
    """Outputs per step of a program, warps of a program, and programs per SM."""

    outputs: int
    warps: int
    programs: int


def choose_tile(inputs: int, *, gated: bool) -> NormGemvTile:
    """Choose the tile of a problem.

    Of a dozen tiles it is the best on an H100 and an H200, by the time of whole decode steps of models of 2
    and 7 billion parameters.
    """
    # Longer rows leave no registers for eight programs of two warps.
    if inputs > 2048:
        return NormGemvTile(1, 4, 4)
    # Without a gate attention comes next; its programs need room to start early.
    return NormGemvTile(1, 2, 8 if gated else 6)


def norm_gemv_triton(
    x, residual, norm, eps, weight, bias=None, *, activation=None, offset=0.0, scale=None
):  # fmt: skip
    """See :func:`engine.kernels.dispatch.norm_linear`; for one row."""
    inputs, gated = x.shape[1], activation is not None
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert x.shape[0] == 1 and weight.shape[1] == inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and (scale is not None or x.dtype == weight.dtype)
    assert residual is None or residual.is_contiguous()
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(residual)
    tile = choose_tile(inputs, gated=gated)
    share = triton.cdiv(outputs, tile.programs * num_sms(x.device))
    launch(
        _norm_gemv_kernel, (triton.cdiv(outputs, share),),
        x_ptr=x, residual_ptr=x if residual is None else residual, norm_ptr=norm, weight_ptr=weight,
        bias_ptr=x if bias is None else bias, out_ptr=out, total_ptr=total,
        outputs=outputs, inputs=inputs, share=share, weight_stride=weight.stride(0), eps=eps,
        offset=offset, **scale_arguments(x, scale),
        TILE_OUTPUTS=tile.outputs, INPUTS_PAD=triton.next_power_of_2(inputs),
        ADD=residual is not None, BIAS=bias is not None, ACTIVATION=activation or "",
        num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return out, total


@triton.jit
def _load_weights(start, row, end, stride, lane, mask):
    """Load weight rows ``row`` below ``end``; the weight's first row is at ``start``."""
    source = start + row.to(tl.int64)[:, None] * stride + lane
    return tl.load(source, mask=(row < end)[:, None] & mask, other=0.0)


@triton.jit
def _dot(weight, x, scale_ptr, row, groups, lane, row_mask, mask, GROUP: tl.constexpr):
    """Dot products of weight rows, times their scales, with the row ``x``."""
    products = weight.to(tl.float32) * x
    if GROUP > 0:
        products *= load_scales(scale_ptr, row[:, None], groups, lane // GROUP, row_mask[:, None] & mask)
    result = tl.sum(products, axis=1)
    if GROUP == 0:
        result *= tl.load(scale_ptr + row, mask=row_mask, other=0.0)
    return result


# ``share`` differs between layers; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["share"])
def _norm_gemv_kernel(
    x_ptr, residual_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr,
    outputs, inputs, share, weight_stride, eps, offset, scale_ptr, groups,
    GROUP: tl.constexpr, TILE_OUTPUTS: tl.constexpr, INPUTS_PAD: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per ``share`` of outputs; ``GROUP`` as in :func:`~engine.kernels.scales.scale_arguments`."""
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, outputs)
    row = first + tl.arange(0, TILE_OUTPUTS)
    lane = tl.arange(0, INPUTS_PAD)[None, :]
    mask = lane < inputs
    up_ptr = weight_ptr + tl.cast(outputs, tl.int64) * weight_stride
    # Prefetch weight rows during the step before, the first ones before the previous kernel has written x.
    next_weight = _load_weights(weight_ptr, row, end, weight_stride, lane, mask)
    next_up = next_weight
    if ACTIVATION != "":
        next_up = _load_weights(up_ptr, row, end, weight_stride, lane, mask)
    norm = tl.load(norm_ptr + lane, mask=mask, other=0.0)
    # The next kernel, decode attention, may prefetch its keys meanwhile.
    launch_dependents(PDL)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + lane, mask=mask, other=0.0)
    if ADD:
        added = tl.load(residual_ptr + lane, mask=mask, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + lane, x, mask=mask)
    wide = x.to(tl.float32)
    # 1 / RMS is a factor of each output, and multiplies the sum instead of the row.
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / inputs + eps)
    wide *= norm.to(tl.float32) + offset
    for _ in range(first, end, TILE_OUTPUTS):
        weight = next_weight
        up = next_up
        next_row = row + TILE_OUTPUTS
        next_weight = _load_weights(weight_ptr, next_row, end, weight_stride, lane, mask)
        if ACTIVATION != "":
            next_up = _load_weights(up_ptr, next_row, end, weight_stride, lane, mask)
        row_mask = row < end
        result = _dot(weight, wide, scale_ptr, row, groups, lane, row_mask, mask, GROUP) * scale
        if BIAS:
            result += tl.load(bias_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
        if ACTIVATION != "":
            factor = _dot(up, wide, scale_ptr, outputs + row, groups, lane, row_mask, mask, GROUP) * scale
            if BIAS:
                factor += tl.load(bias_ptr + outputs + row, mask=row_mask, other=0.0).to(tl.float32)
            result = activate(result, ACTIVATION) * factor
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=row_mask)
        row = next_row
