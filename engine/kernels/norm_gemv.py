"""GEMV with the sum and the norm before it and the gate after it, in one launch.

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
from engine.kernels.rms_norm import Addend, multiplied, rms_norm_reference, scaled_by_norm
from engine.kernels.scales import scale_arguments, times_scales
from engine.kernels.split_sums import Pair, rounded_sum, whole


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
    x, residual, norm, eps, weight, bias=None, *, activation=None, offset=None, centred=False, scale=None
):  # fmt: skip
    """See :func:`engine.kernels.dispatch.norm_linear`; for one row."""
    before = x if isinstance(x, Addend) and residual is not None else None
    first = whole(x.first) if isinstance(x, Pair) and residual is not None else None
    x = whole(before.x if before is not None else x.second if first is not None else x)
    inputs, gated = x.shape[1], activation is not None
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert x.shape[0] == 1 and weight.shape[1] == inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and (scale is not None or x.dtype == weight.dtype)
    assert residual is None or residual.is_contiguous()
    assert first is None or first.is_contiguous()
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(residual)
    tile = choose_tile(inputs, outputs, gated=gated)
    share = triton.cdiv(outputs, tile.programs * num_sms(x.device))
    length, rest = _split_row(inputs)
    launch(
        _norm_gemv_kernel, (triton.cdiv(outputs, share),),
        x_ptr=x, first_ptr=x if first is None else first, residual_ptr=x if residual is None else residual,
        **(before or Addend(x, None, 0.0)).arguments(x),
        norm_ptr=x if norm is None else norm, weight_ptr=weight,
        bias_ptr=x if bias is None else bias, out_ptr=out, total_ptr=total,
        outputs=outputs, inputs=inputs, share=share, weight_stride=weight.stride(0), eps=eps,
        offset=offset or 0.0, **scale_arguments(x, scale),
        TILE_OUTPUTS=tile.outputs, INPUTS=length, REST=rest,
        FIRST=first is not None,
        ADD=residual is not None, NORM=norm is not None, CENTRED=centred, BIAS=bias is not None, ACTIVATION=activation or "",
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
def _sum_of_squares(x):
    """Add up the squares of a part of the row: ``(1, 1)`` in float32."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1, keep_dims=True)


@triton.jit
def _normed_before(x, before_ptr, offset, inverse, lane, inputs, OFFSET: tl.constexpr):
    """Return a part of the row's norm that is added to the residual; ``inverse`` is 1 / RMS of the row."""
    weight = tl.load(before_ptr + lane, mask=lane < inputs, other=0.0)
    return scaled_by_norm(x, inverse, weight, offset, OFFSET)


@triton.jit
def _added(x, first_ptr, residual_ptr, total_ptr, lane, inputs, FIRST: tl.constexpr):
    """Add a part of the row to the residual, behind that of ``first_ptr`` if there is one; store and return the sum."""
    total = tl.load(residual_ptr + lane, mask=lane < inputs, other=0.0)
    if FIRST:
        total = rounded_sum(tl.load(first_ptr + lane, mask=lane < inputs, other=0.0), total)
    total = rounded_sum(x, total)
    if tl.program_id(0) == 0:
        tl.store(total_ptr + lane, total, mask=lane < inputs)
    return total


@triton.jit
def _norm_weight(norm_ptr, offset, lane, inputs, NORM: tl.constexpr):
    """Load a part of the norm's weight, in float32."""
    if NORM:
        weight = tl.load(norm_ptr + lane, mask=lane < inputs, other=0.0).to(tl.float32) + offset
    else:
        weight = tl.full(lane.shape, 1.0, tl.float32)
    return weight


# ``share`` differs between layers; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["share"])
def _norm_gemv_kernel(
    x_ptr, first_ptr, residual_ptr, before_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr,
    outputs, inputs, share, weight_stride, before_eps, before_offset, multiplier, eps, offset, scale_ptr, groups,
    GROUP: tl.constexpr, TILE_OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, REST: tl.constexpr,
    BEFORE: tl.constexpr, BEFORE_OFFSET: tl.constexpr, MULTIPLY: tl.constexpr, FIRST: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per ``share`` of outputs; ``GROUP`` as in :func:`~engine.kernels.scales.scale_arguments`.

    Args:
        BEFORE: whether the RMS norm of ``x`` is added to the residual, not ``x``.
        FIRST: whether the row of ``first_ptr`` is added to the residual before ``x``.
        NORM, CENTRED: whether there is a norm of the sum, and whether it is a layer norm.
    """
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
    norm = _norm_weight(norm_ptr, offset, lane, inputs, NORM)
    norm_rest = norm
    if REST > 0:
        norm_rest = _norm_weight(norm_ptr, offset, rest, inputs, NORM)
    # The next kernel, decode attention, may prefetch its keys meanwhile.
    launch_dependents(PDL)
    wait_for_previous(PDL)
    row_part = tl.load(x_ptr + lane, mask=lane < inputs, other=0.0)
    row_rest = row_part
    if REST > 0:
        row_rest = tl.load(x_ptr + rest, mask=rest < inputs, other=0.0)
    if BEFORE:
        squares = _sum_of_squares(row_part)
        if REST > 0:
            squares += _sum_of_squares(row_rest)
        inverse = 1.0 / tl.sqrt(squares / inputs + before_eps)
        row_part = _normed_before(row_part, before_ptr, before_offset, inverse, lane, inputs, BEFORE_OFFSET)
        if REST > 0:
            row_rest = _normed_before(
                row_rest, before_ptr, before_offset, inverse, rest, inputs, BEFORE_OFFSET
            )
    if MULTIPLY:
        row_part, row_rest = multiplied(row_part, multiplier), multiplied(row_rest, multiplier)
    if ADD:
        row_part = _added(row_part, first_ptr, residual_ptr, total_ptr, lane, inputs, FIRST)
        if REST > 0:
            row_rest = _added(row_rest, first_ptr, residual_ptr, total_ptr, rest, inputs, FIRST)
    x, x_rest = row_part.to(tl.float32), row_rest.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1, keep_dims=True)
        if REST > 0:
            mean += tl.sum(x_rest, axis=1, keep_dims=True)
        mean /= inputs
        x = tl.where(lane < inputs, x - mean, 0.0)
        if REST > 0:
            x_rest = tl.where(rest < inputs, x_rest - mean, 0.0)
    scale = 1.0
    if NORM:
        squares = tl.sum(x * x, axis=1)
        x *= norm
        if REST > 0:
            squares += tl.sum(x_rest * x_rest, axis=1)
            x_rest *= norm_rest
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
