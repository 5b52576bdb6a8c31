"""Linear layers. Products with one row and with a few are ours, those with more are left to torch.

The product with one row is bound by reading the weight: each program reads a few rows of it from end to end and
sums products, and there is nothing for the matrix unit to do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels import few_rows
from engine.kernels.act_mul import act_mul
from engine.kernels.dispatch import use_triton
from engine.kernels.launch import launch
from engine.kernels.overlap import overlap, wait_for_previous


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32, and the gate after it where there is one.

    Args:
        x: ``(T, K)``, last dimension contiguous.
        weight: ``(N, K)``, last dimension contiguous, dtype of ``x``.
        bias: ``(N,)``.
        activation: ``silu`` or ``gelu_tanh``: the first half of the outputs goes through it and multiplies the
            second, see :func:`engine.kernels.act_mul.act_mul`.
        arrivals: int32 zeros for the layer's own use, see :func:`arrivals_of`; None: a few rows may take longer.

    Returns:
        ``(T, N)``, or ``(T, N / 2)`` with an activation, in the dtype of ``x``.
    """
    if few_rows.takes(x, weight):
        return few_rows.few_rows_linear_triton(x, weight, bias, activation=activation, arrivals=arrivals)
    out = (linear_triton if is_row(x) else linear_reference)(x, weight, bias)
    return out if activation is None else act_mul(out, activation)


def arrivals_of(outputs: int, device: torch.device) -> torch.Tensor:
    """What a layer with so many outputs gives to each of its calls of :func:`linear`, one at a time."""
    return torch.zeros(triton.cdiv(outputs, few_rows.TILE_OUTPUTS), dtype=torch.int32, device=device)


def is_row(x: torch.Tensor) -> bool:
    """Whether ``x`` ``(T, K)`` is one row on a device where the product with it is ours."""
    return x.shape[0] == 1 and use_triton(x)


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Outputs and inputs per tile, and warps of a program."""

    outputs: int
    inputs: int
    warps: int


def tiling(outputs: int, inputs: int) -> Tiling:
    """The tile for a problem; the one place where this is decided.

    The best of nine on an H100 and an H200, by the time of whole decode steps of models of 2 and 7 billion
    parameters, or within a hundredth of it.
    """
    if outputs > 8192:
        tile_outputs, tile_inputs, warps = 4, 512, 4
    elif outputs > 2048:
        # One output for a program: the smaller it is, the more of them a processor holds at once.
        tile_outputs, tile_inputs, warps = 1, 256, 2
    else:
        tile_outputs, tile_inputs, warps = 1, 1024, 4
    return Tiling(tile_outputs, min(tile_inputs, triton.next_power_of_2(inputs)), warps)


def linear_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    outputs, inputs = weight.shape
    assert x.shape == (1, inputs) and inputs > 0
    assert x.stride(-1) == weight.stride(-1) == 1 and x.dtype == weight.dtype
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    tile = tiling(outputs, inputs)
    launch(
        _gemv_kernel,
        (triton.cdiv(outputs, tile.outputs),),
        x,
        weight,
        x if bias is None else bias,
        out,
        outputs,
        inputs,
        weight.stride(0),
        TILE_OUTPUTS=tile.outputs,
        TILE_INPUTS=tile.inputs,
        BIAS=bias is not None,
        num_warps=tile.warps,
        **overlap(x),
    )
    return out


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    outputs,
    inputs,
    weight_stride,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    wanted = (output < outputs)[:, None]
    lane = tl.arange(0, TILE_INPUTS)[None, :]
    weights = weight_ptr + output.to(tl.int64)[:, None] * weight_stride
    # The input is read by every row of a tile, each time from the cache: were it read once and spread, the
    # threads might have to wait for each other in every round.
    spread = tl.zeros([TILE_OUTPUTS, 1], tl.int32)
    products = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float32)
    # Each tile of weights is asked for while the one before it is worked on, the first even while the kernel
    # ahead still computes the input.
    next_weight = tl.load(weights + lane, mask=wanted & (lane < inputs), other=0.0)
    wait_for_previous(OVERLAP)
    for first in range(0, inputs, TILE_INPUTS):
        weight = next_weight
        ahead = first + TILE_INPUTS + lane
        next_weight = tl.load(weights + ahead, mask=wanted & (ahead < inputs), other=0.0)
        k = spread + first + lane
        x = tl.load(x_ptr + k, mask=k < inputs, other=0.0)
        products += weight.to(tl.float32) * x.to(tl.float32)
    result = tl.sum(products, axis=1)
    if BIAS:
        result += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=output < outputs)
