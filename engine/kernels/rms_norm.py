"""Root-mean-square norm, with the residual addition before it in the same pass."""

from __future__ import annotations

from typing import overload

import torch
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton
from engine.kernels.launch import launch
from engine.kernels.overlap import overlap, wait_for_previous


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: None = None, *, offset: float = 0.0
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, *, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(x, weight, eps, residual=None, *, offset=0.0):
    """``(weight + offset) * x / sqrt(mean(x²) + eps)`` over the last dimension.

    Rounds as Transformers' LlamaRMSNorm does: normalised in float32, cast to the input's dtype, then scaled.

    Args:
        x: ``(..., H)``; rows may be strided, the last dimension is contiguous.
        weight: ``(H,)``.
        residual: as ``x``; added first, in the input's dtype.
        offset: 1 for the families that store ``weight - 1``.

    Returns:
        The norm, contiguous; with ``residual`` also ``x + residual``.
    """
    if use_triton(x):
        return rms_norm_triton(x, weight, eps, residual, offset=offset)
    return rms_norm_reference(x, weight, eps, residual, offset=offset)


def rms_norm_reference(x, weight, eps, residual=None, *, offset=0.0):
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    out = normed * (weight + offset) if offset else normed * weight
    return out if residual is None else (out, x)


def rms_norm_triton(x, weight, eps, residual=None, *, offset=0.0):
    size = x.shape[-1]
    assert x.stride(-1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual is not None else out
    if residual is not None:
        residual = residual.contiguous()
    # Rows of a (T, H, D) view lie at two strides; of a matrix, at one.
    inner = x.shape[-2] if x.dim() == 3 else 1
    rows = x.numel() // size
    if x.dim() not in (2, 3):
        x = x.contiguous().view(rows, size)
    if rows:
        block = triton.next_power_of_2(size)
        launch(
            _rms_norm_kernel,
            (rows,),
            x,
            residual if residual is not None else x,
            weight,
            out,
            total,
            x.stride(0),
            x.stride(-2) if x.dim() == 3 else 0,
            inner,
            eps,
            offset,
            SIZE=size,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=1 if block <= 256 else (4 if block <= 4096 else 8),
            **overlap(x),
        )
    return out if residual is None else (out, total)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    outer_stride,
    inner_stride,
    inner,
    eps,
    offset,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    source = x_ptr + row // inner * outer_stride + row % inner * inner_stride
    x = tl.load(source + column, mask=mask, other=0.0)
    dtype = x.dtype
    if ADD:
        added = tl.load(residual_ptr + row * SIZE + column, mask=mask, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * SIZE + column, x, mask=mask)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    weight = (weight + offset).to(dtype).to(tl.float32)
    normed = (wide * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, (normed * weight).to(dtype), mask=mask)
