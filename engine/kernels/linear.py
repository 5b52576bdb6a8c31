"""Linear layers, with the norm and the gate that stand around them in one launch where there is one row.

A product with one row is bound by reading the weight: each program reads a few rows of it from end to end and
sums products, and there is nothing for the matrix unit to do. What the norm before a layer needs of the input
comes by on the way: the scale of the row is a factor of the whole sum, and goes in last. Products with more rows
are left to torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.act_mul import act_mul, activate
from engine.kernels.dispatch import use_triton
from engine.kernels.launch import launch
from engine.kernels.overlap import overlap, wait_for_previous
from engine.kernels.rms_norm import rms_norm


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32 and rounded once.

    Args:
        x: ``(T, K)``, last dimension contiguous.
        weight: ``(N, K)``, last dimension contiguous, dtype of ``x``.
        bias: ``(N,)``.

    Returns:
        ``(T, N)`` in the dtype of ``x``.
    """
    return (linear_triton if _is_row(x) else linear_reference)(x, weight, bias)


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
    that it is made of then.

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
    run = norm_linear_triton if _is_row(x) else norm_linear_reference
    return run(x, residual, norm, eps, weight, bias, activation=activation)


def _is_row(x: torch.Tensor) -> bool:
    return x.shape[0] == 1 and use_triton(x)


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)


def norm_linear_reference(x, residual, norm, eps, weight, bias=None, *, activation=None):
    normed, total = (rms_norm(x, norm, eps), x) if residual is None else rms_norm(x, norm, eps, residual)
    out = F.linear(normed, weight, bias)
    return out if activation is None else act_mul(out, activation), total


@dataclass(frozen=True, slots=True)
class Tiling:
    """Outputs and inputs per tile, and warps of a program."""

    outputs: int
    inputs: int
    warps: int


def tiling(outputs: int, inputs: int, after_norm: bool) -> Tiling:
    """The tile for a problem; the one place where this is decided.

    The best of nine on an H100, for layers of 2 and 7 billion parameters, or within a tenth of it. What a norm
    adds takes registers; a plain product reads the longer runs of each row, the fewer its rows are.
    """
    tile_outputs, tile_inputs = (4, 512) if after_norm or outputs > 8192 else (4, 1024)
    if outputs < 2048 and not after_norm:
        tile_outputs, tile_inputs = 2, 2048
    return Tiling(tile_outputs, min(tile_inputs, triton.next_power_of_2(inputs)), 4)


def linear_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _launch(x, None, None, 0.0, weight, bias, None)[0]


def norm_linear_triton(x, residual, norm, eps, weight, bias=None, *, activation=None):
    return _launch(x, residual, norm, eps, weight, bias, activation)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, gated = x.shape[1], activation is not None
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert x.shape[0] == 1 and weight.shape[1] == inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and x.dtype == weight.dtype
    assert residual is None or residual.is_contiguous()
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(residual)
    tile = tiling(outputs, inputs, norm is not None)
    launch(
        _gemv_kernel,
        (triton.cdiv(outputs, tile.outputs),),
        x,
        x if residual is None else residual,
        x if norm is None else norm,
        weight,
        x if bias is None else bias,
        out,
        total,
        outputs,
        inputs,
        weight.stride(0),
        eps,
        TILE_OUTPUTS=tile.outputs,
        TILE_INPUTS=tile.inputs,
        NORM=norm is not None,
        ADD=residual is not None,
        BIAS=bias is not None,
        ACTIVATION=activation or "",
        num_warps=tile.warps,
        **overlap(x),
    )
    return out, total


@triton.jit
def _gemv_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    outputs,
    inputs,
    weight_stride,
    eps,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    wanted = (output < outputs)[:, None]
    lane = tl.arange(0, TILE_INPUTS)[None, :]
    weights = weight_ptr + output.to(tl.int64)[:, None] * weight_stride
    ups = weights + tl.cast(outputs, tl.int64) * weight_stride
    # Vectors are read by every row of a tile, each time from the cache: were they read once and spread, the
    # threads would have to wait for each other in every round.
    spread = tl.zeros([TILE_OUTPUTS, 1], tl.int32)
    products = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    up_products = products
    squares = products
    # Each tile of weights is asked for while the one before it is worked on, the first even while the kernel
    # ahead still computes the input.
    mask = wanted & (lane < inputs)
    next_weight = tl.load(weights + lane, mask=mask, other=0.0)
    next_up = next_weight
    if ACTIVATION != "":
        next_up = tl.load(ups + lane, mask=mask, other=0.0)
    wait_for_previous(OVERLAP)
    for first in range(0, inputs, TILE_INPUTS):
        weight = next_weight
        up = next_up
        ahead = first + TILE_INPUTS + lane
        mask = wanted & (ahead < inputs)
        next_weight = tl.load(weights + ahead, mask=mask, other=0.0)
        if ACTIVATION != "":
            next_up = tl.load(ups + ahead, mask=mask, other=0.0)
        k = spread + first + lane
        inside = k < inputs
        x = tl.load(x_ptr + k, mask=inside, other=0.0)
        wide = x.to(tl.float32)
        if ADD:
            added = tl.load(residual_ptr + k, mask=inside, other=0.0)
            x = (wide + added.to(tl.float32)).to(x.dtype)
            # By the first output's row alone.
            tl.store(total_ptr + k, x, mask=inside & (output == 0)[:, None])
            wide = x.to(tl.float32)
        if NORM:
            squares += wide * wide
            wide *= tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
        products += weight.to(tl.float32) * wide
        if ACTIVATION != "":
            up_products += up.to(tl.float32) * wide
    result = tl.sum(products, axis=1)
    factor = tl.sum(up_products, axis=1)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / inputs + eps)
        result *= scale
        factor *= scale
    if BIAS:
        result += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        if BIAS:
            factor += tl.load(bias_ptr + outputs + output, mask=output < outputs, other=0.0).to(tl.float32)
        result = activate(result, ACTIVATION == "silu") * factor
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=output < outputs)
