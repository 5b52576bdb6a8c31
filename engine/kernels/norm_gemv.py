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
from engine.kernels.scales import scale_arguments, times_scales


def norm_linear_reference(x, residual, norm, eps, weight, bias=None, *, activation=None, offset=None):
    """Compute :func:`~engine.kernels.dispatch.norm_linear` in torch; every operation rounds its result."""
    total = x if residual is None else x + residual
    out = F.linear(rms_norm_reference(total, norm, eps, offset=offset), weight, bias)
    return out if activation is None else act_mul_reference(out, activation), total


@dataclass(frozen=True, slots=True)
class NormGemvTile:
    """Outputs per step of a program, warps of a program, programs per SM, and the registers that a thread may take,
    if they must be fewer than the compiler would take for so many programs to fit."""

    outputs: int
    warps: int
    programs: int
    registers: int | None = None


def choose_tile(inputs: int, outputs: int, *, gated: bool) -> NormGemvTile:
    """Choose the tile of a problem.

    Of a dozen tiles it is the best on an H100 and an H200, by the time of whole decode steps of models of 2
    and 7 billion parameters; of 15 for 2560 inputs by chains of launches, and of 11 for 2048 inputs and 5120
    outputs by the time of whole decoder layers, on an H200. For 3584 to 5120 inputs it is the best of 11 and 13, or
    within 0.5 % of it, by chains of a layer's GEMVs of six models on an H200.
    """
    lanes = sum(_split_row(inputs))
    # Longer rows leave no registers for eight programs of two warps.
    if 4096 < lanes <= 5120:
        # Without the limit a thread would take three registers more, and only two programs would fit.
        return NormGemvTile(1, 4, 3, 168) if gated else NormGemvTile(2, 4, 3)
    if lanes > 3072:
        return NormGemvTile(1, 4, 4) if gated or lanes > 5120 else NormGemvTile(2, 4, 4)
    if lanes > 2048:
        return NormGemvTile(1, 2, 6) if gated else NormGemvTile(1, 1, 8)
    if gated:
        return NormGemvTile(1, 2, 8)
    # Attention comes next; its programs need room to start early.
    return NormGemvTile(1, 2, 8 if inputs <= 1536 or outputs > 4096 else 6)


def _split_row(inputs: int) -> tuple[int, int]:
    """Pad a row to powers of two, where it pays in two parts: 2560 inputs are 2048 and 512, not 4096; 5120 are
    4096 and 1024.

    1536 inputs in two parts are slower (a token of a model of 2 billion parameters took 5 % longer).
    """
    padded = triton.next_power_of_2(inputs)
    half = padded // 2
    # Beyond three quarters of the padded row two parts are as long.
    if half < 2048 or inputs > half + half // 2:
        return padded, 0
    return half, triton.next_power_of_2(inputs - half)


def norm_gemv_triton(
    x, residual, norm, eps, weight, bias=None, *, activation=None, offset=None, scale=None
):  # fmt: skip
    """See :func:`engine.kernels.dispatch.norm_linear`; for one row."""
    inputs, gated = x.shape[1], activation is not None
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert x.shape[0] == 1 and weight.shape[1] == inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and (scale is not None or x.dtype == weight.dtype)
    assert residual is None or residual.is_contiguous()
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(residual)
    tile = choose_tile(inputs, outputs, gated=gated)
    share = triton.cdiv(outputs, tile.programs * num_sms(x.device))
    first, rest = _split_row(inputs)
    launch(
        _norm_gemv_kernel, (triton.cdiv(outputs, share),),
        x_ptr=x, residual_ptr=x if residual is None else residual, norm_ptr=norm, weight_ptr=weight,
        bias_ptr=x if bias is None else bias, out_ptr=out, total_ptr=total,
        outputs=outputs, inputs=inputs, share=share, weight_stride=weight.stride(0), eps=eps,
        offset=offset or 0.0, **scale_arguments(x, scale),
        TILE_OUTPUTS=tile.outputs, INPUTS=first, REST=rest,
        ADD=residual is not None, BIAS=bias is not None, ACTIVATION=activation or "",
        num_warps=tile.warps, maxnreg=tile.registers, **pdl_options(x),
    )  # fmt: skip
    return out, total


@triton.jit
def _load_weights(start, row, end, stride, lane, mask):
    """Load weight rows ``row`` below ``end``; the weight's first row is at ``start``."""
    source = start + row.to(tl.int64)[:, None] * stride + lane
    return tl.load(source, mask=(row < end)[:, None] & mask, other=0.0)


@triton.jit
def _load_both(start, row, end, stride, lane, rest, inputs, REST: tl.constexpr):
    """Load both parts of weight rows; without a second part the first one again."""
    first = _load_weights(start, row, end, stride, lane, lane < inputs)
    second = first
    if REST > 0:
        second = _load_weights(start, row, end, stride, rest, rest < inputs)
    return first, second


@triton.jit
def _dot(weight, x, scale_ptr, row, groups, first, row_mask, inputs, GROUP: tl.constexpr):
    """Dot products of a part of weight rows, times the scales of groups, with that of the row ``x``."""
    products = weight.to(tl.float32) * x
    if GROUP > 0:
        products = times_scales(products, scale_ptr, row, row_mask, groups, first, inputs, GROUP)
    return tl.sum(products, axis=1)


@triton.jit
def _dot_both(
    weight, weight_rest, x, x_rest, scale_ptr, row, groups, row_mask, inputs,
    GROUP: tl.constexpr, INPUTS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Dot products of weight rows, times their scales, with the row ``x``."""
    result = _dot(weight, x, scale_ptr, row, groups, 0, row_mask, inputs, GROUP)
    if REST > 0:
        result += _dot(weight_rest, x_rest, scale_ptr, row, groups, INPUTS, row_mask, inputs, GROUP)
    if GROUP == 0:
        result *= tl.load(scale_ptr + row, mask=row_mask, other=0.0)
    return result


@triton.jit
def _load_input(x_ptr, residual_ptr, total_ptr, norm, lane, inputs, ADD: tl.constexpr):
    """Load a part of the row, add and store the sum; return it times the norm's weight, and its squares' sum."""
    x = tl.load(x_ptr + lane, mask=lane < inputs, other=0.0)
    if ADD:
        added = tl.load(residual_ptr + lane, mask=lane < inputs, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + lane, x, mask=lane < inputs)
    wide = x.to(tl.float32)
    return wide * norm, tl.sum(wide * wide, axis=1)


# ``share`` differs between layers; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["share"])
def _norm_gemv_kernel(
    x_ptr, residual_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr,
    outputs, inputs, share, weight_stride, eps, offset, scale_ptr, groups,
    GROUP: tl.constexpr, TILE_OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, REST: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per ``share`` of outputs; ``GROUP`` as in :func:`~engine.kernels.scales.scale_arguments`."""
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, outputs)
    row = first + tl.arange(0, TILE_OUTPUTS)
    lane = tl.arange(0, INPUTS)[None, :]
    rest = INPUTS + tl.arange(0, REST if REST > 0 else 1)[None, :]
    up_ptr = weight_ptr + tl.cast(outputs, tl.int64) * weight_stride
    # Prefetch weight rows during the step before, the first ones before the previous kernel has written x.
    next_weight, next_weight_rest = _load_both(weight_ptr, row, end, weight_stride, lane, rest, inputs, REST)
    next_up, next_up_rest = next_weight, next_weight_rest
    if ACTIVATION != "":
        next_up, next_up_rest = _load_both(up_ptr, row, end, weight_stride, lane, rest, inputs, REST)
    norm = tl.load(norm_ptr + lane, mask=lane < inputs, other=0.0).to(tl.float32) + offset
    if REST > 0:
        norm_rest = tl.load(norm_ptr + rest, mask=rest < inputs, other=0.0).to(tl.float32) + offset
    # The next kernel, decode attention, may prefetch its keys meanwhile.
    launch_dependents(PDL)
    wait_for_previous(PDL)
    x, squares = _load_input(x_ptr, residual_ptr, total_ptr, norm, lane, inputs, ADD)
    x_rest = x
    if REST > 0:
        x_rest, more = _load_input(x_ptr, residual_ptr, total_ptr, norm_rest, rest, inputs, ADD)
        squares += more
    # 1 / RMS is a factor of each output, and multiplies the sum instead of the row.
    scale = 1.0 / tl.sqrt(squares / inputs + eps)
    for _ in range(first, end, TILE_OUTPUTS):
        weight, weight_rest = next_weight, next_weight_rest
        up, up_rest = next_up, next_up_rest
        next_row = row + TILE_OUTPUTS
        next_weight, next_weight_rest = _load_both(
            weight_ptr, next_row, end, weight_stride, lane, rest, inputs, REST
        )
        if ACTIVATION != "":
            next_up, next_up_rest = _load_both(up_ptr, next_row, end, weight_stride, lane, rest, inputs, REST)
        row_mask = row < end
        result = scale * _dot_both(
            weight, weight_rest, x, x_rest, scale_ptr, row, groups, row_mask, inputs, GROUP, INPUTS, REST
        )  # fmt: skip
        if BIAS:
            result += tl.load(bias_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
        if ACTIVATION != "":
            factor = scale * _dot_both(
                up, up_rest, x, x_rest, scale_ptr, outputs + row, groups, row_mask, inputs, GROUP, INPUTS, REST
            )  # fmt: skip
            if BIAS:
                factor += tl.load(bias_ptr + outputs + row, mask=row_mask, other=0.0).to(tl.float32)
            result = activate(result, ACTIVATION) * factor
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=row_mask)
        row = next_row
