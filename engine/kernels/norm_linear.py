"""A linear layer with the norm before it and the gate after it, in one launch where there is one row.

The product is bound by reading the weight, see :mod:`engine.kernels.linear`. Each program normalises the row by
itself, keeps it in registers and goes through its share of the weight's rows with it. The programs are as many as
the device runs at a time, so that what each does at first is done once, and the weights of its first rows are
on their way meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.launch import launch
from engine.kernels.linear import is_row, linear
from engine.kernels.overlap import overlap, start_next, wait_for_previous
from engine.kernels.rms_norm import rms_norm
from engine.kernels.tiling import num_processors


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer of the RMS norm of ``x + residual``, and that sum.

    With one row nothing is rounded in between but the sum; with more, what comes from each of the operations
    that it is made of then, see :func:`engine.kernels.linear.linear`.

    Args:
        x: ``(T, K)``, last dimension contiguous.
        residual: as ``x``, contiguous; None adds nothing.
        norm: ``(K,)``, scale of the norm.
        eps: of the norm.
        weight: ``(N, K)``, last dimension contiguous, dtype of ``x``.
        bias: ``(N,)``.
        activation: ``silu`` or ``gelu_tanh``: the first half of the outputs goes through it and multiplies the
            second, see :func:`engine.kernels.act_mul.act_mul`.

    Returns:
        ``(T, N)``, or ``(T, N / 2)`` with an activation, and ``(T, K)``; both in the dtype of ``x``.
    """
    run = norm_linear_triton if is_row(x) else norm_linear_reference
    return run(x, residual, norm, eps, weight, bias, activation=activation)


def norm_linear_reference(x, residual, norm, eps, weight, bias=None, *, activation=None):
    normed, total = (rms_norm(x, norm, eps), x) if residual is None else rms_norm(x, norm, eps, residual)
    return linear(normed, weight, bias, activation=activation), total


@dataclass(frozen=True, slots=True)
class Tiling:
    """Outputs per round of a program, its warps, and programs per processor."""

    outputs: int
    warps: int
    programs: int


def tiling(inputs: int, *, gated: bool) -> Tiling:
    """The tile for a problem; the one place where this is decided.

    The best of a dozen on an H100 and an H200, by the time of whole decode steps of models of 2 and 7 billion
    parameters.
    """
    # Longer rows would not leave registers for eight programs of two warps.
    if inputs > 2048:
        return Tiling(1, 4, 4)
    # Without a gate it is attention that comes next: its programs find room to start in.
    return Tiling(1, 2, 8 if gated else 6)


def norm_linear_triton(x, residual, norm, eps, weight, bias=None, *, activation=None):
    inputs, gated = x.shape[1], activation is not None
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert x.shape[0] == 1 and weight.shape[1] == inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and x.dtype == weight.dtype
    assert residual is None or residual.is_contiguous()
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(residual)
    tile = tiling(inputs, gated=gated)
    share = triton.cdiv(outputs, tile.programs * num_processors(x.device))
    launch(
        _norm_gemv_kernel,
        (triton.cdiv(outputs, share),),
        x,
        x if residual is None else residual,
        norm,
        weight,
        x if bias is None else bias,
        out,
        total,
        outputs,
        inputs,
        share,
        weight.stride(0),
        eps,
        TILE_OUTPUTS=tile.outputs,
        INPUTS_PAD=triton.next_power_of_2(inputs),
        ADD=residual is not None,
        BIAS=bias is not None,
        ACTIVATION=activation or "",
        num_warps=tile.warps,
        **overlap(x),
    )
    return out, total


@triton.jit
def _load_rows(start, row, end, stride, lane, inside):
    """Of the weight whose first row is at ``start``, the tile of rows ``row`` before ``end``."""
    place = start + row.to(tl.int64)[:, None] * stride + lane
    return tl.load(place, mask=(row < end)[:, None] & inside, other=0.0)


# Layers differ in this number; a kernel compiled for each would make a long start.
@triton.jit(do_not_specialize=["share"])
def _norm_gemv_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    outputs,
    inputs,
    share,
    weight_stride,
    eps,
    TILE_OUTPUTS: tl.constexpr,
    INPUTS_PAD: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, outputs)
    row = first + tl.arange(0, TILE_OUTPUTS)
    lane = tl.arange(0, INPUTS_PAD)[None, :]
    inside = lane < inputs
    up_ptr = weight_ptr + tl.cast(outputs, tl.int64) * weight_stride
    # Rows of the weight are asked for while those before them are worked on, the first even while the kernel
    # ahead still computes the input.
    next_weight = _load_rows(weight_ptr, row, end, weight_stride, lane, inside)
    next_up = next_weight
    if ACTIVATION != "":
        next_up = _load_rows(up_ptr, row, end, weight_stride, lane, inside)
    norm = tl.load(norm_ptr + lane, mask=inside, other=0.0)
    # Attention may ask for its keys meanwhile.
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    x = tl.load(x_ptr + lane, mask=inside, other=0.0)
    if ADD:
        added = tl.load(residual_ptr + lane, mask=inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + lane, x, mask=inside)
    wide = x.to(tl.float32)
    # The scale of the row is a factor of each whole sum, and goes in last.
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / inputs + eps)
    wide *= norm.to(tl.float32)
    for _ in range(first, end, TILE_OUTPUTS):
        weight = next_weight
        up = next_up
        ahead = row + TILE_OUTPUTS
        next_weight = _load_rows(weight_ptr, ahead, end, weight_stride, lane, inside)
        if ACTIVATION != "":
            next_up = _load_rows(up_ptr, ahead, end, weight_stride, lane, inside)
        mine = row < end
        result = tl.sum(weight.to(tl.float32) * wide, axis=1) * scale
        if BIAS:
            result += tl.load(bias_ptr + row, mask=mine, other=0.0).to(tl.float32)
        if ACTIVATION != "":
            factor = tl.sum(up.to(tl.float32) * wide, axis=1) * scale
            if BIAS:
                factor += tl.load(bias_ptr + outputs + row, mask=mine, other=0.0).to(tl.float32)
            result = activate(result, ACTIVATION) * factor
        tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=mine)
        row = ahead
