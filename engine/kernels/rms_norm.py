"""RMS norm, with the residual addition before it in the same kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.fp8 import RoundedRows, quantise_rows_reference, reads_fp8, rounding_warps, store_rounded
from engine.kernels.launch import launch
from engine.kernels.pdl import launch_dependents_of_one_row, pdl_options, wait_for_previous
from engine.kernels.split_sums import (
    Pair,
    SplitSums,
    Unfinished,
    load_result,
    rounded_sum,
    tensor_and_parts,
    whole,
)


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: None = None, *, offset: float | None = None
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor | Unfinished,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    *,
    offset: float | None = None,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(x, weight, eps, residual=None, *, offset=None, factor=None):
    """Compute ``(weight + offset) * x / sqrt(mean(x²) + eps)`` over the last dimension.

    It rounds as Transformers' LlamaRMSNorm: normalise in float32, cast to the input's dtype, then scale. With
    an offset, which may be 0, as its Gemma3RMSNorm and Gemma4RMSNorm: add the offset and scale in float32, then
    cast.

    Args:
        x: ``(..., H)``; may be strided, last dimension contiguous. With ``residual`` it may be unfinished.
        weight: ``(H,)``; with ``residual`` None for no norm of the sum.
        residual: shape of ``x``; added to it first, in the input's dtype. A pair's results are added to it one after
            the other.
        factor: ``(1,)``, by which the sum is multiplied then, in the input's dtype; None for 1.
        offset: 1 for families whose checkpoints store ``weight - 1``; None to cast before scaling.

    Returns:
        The norm, contiguous; with ``residual`` the norm and ``(x + residual) * factor``.
    """
    x, residual = _one_result(x, residual)
    if use_triton(x if residual is None else residual):
        return rms_norm_triton(x, weight, eps, residual, offset=offset, factor=factor)
    return rms_norm_reference(x, weight, eps, residual, offset=offset, factor=factor)


def _one_result(x, residual):
    """Return what is left to be added to a residual, and the residual: behind the first result of a pair."""
    if residual is not None and isinstance(x, Pair):
        return x.second, sum_with(x.first, residual)
    return x, residual


def rms_norm_reference(x, weight, eps, residual=None, *, offset=None, factor=None):
    if residual is not None:
        x = whole(x) + residual
        x = x if factor is None else x * factor
        if weight is None:
            return x, x
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = scaled_by_weight(normed, weight, offset, x.dtype)
    return out if residual is None else (out, x)


def scaled_by_weight(
    normed: torch.Tensor, weight: torch.Tensor, offset: float | None, dtype: torch.dtype
) -> torch.Tensor:
    """Scale what has a root mean square of 1, in float32, as :func:`rms_norm` does: the result has ``dtype``."""
    if offset is None:
        return normed.to(dtype) * weight
    return (normed * (weight.float() + offset)).to(dtype)


@dataclass(frozen=True, slots=True)
class Addend:
    """What a layer adds to the residual, to be computed where it is added: its result, or the norm of that, times a
    number.

    Attributes:
        x: ``(T, H)``, the layer's result.
        weight: ``(H,)``; None for no norm.
        eps, offset: see :func:`rms_norm`.
        multiplier: the number.
    """

    x: torch.Tensor | SplitSums
    weight: torch.Tensor | None
    eps: float
    offset: float | None = None
    multiplier: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    def total(self) -> torch.Tensor:
        """Compute it."""
        x = whole(self.x)
        if self.weight is not None:
            x = rms_norm(x, self.weight, self.eps, offset=self.offset)
        return x if self.multiplier == 1 else x * self.multiplier

    def arguments(self, given: torch.Tensor) -> dict[str, Any]:
        """Arguments of a kernel that computes it; ``given`` stands in for what is not accessed."""
        return {
            "before_ptr": given if self.weight is None else self.weight, "before_eps": self.eps,
            "before_offset": self.offset or 0.0, "multiplier": self.multiplier, "BEFORE": self.weight is not None,
            "BEFORE_OFFSET": self.offset is not None, "MULTIPLY": self.multiplier != 1,
        }  # fmt: skip


def sum_with(
    x: torch.Tensor | Unfinished, residual: torch.Tensor, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ``(x + residual) * factor`` as :func:`rms_norm` does, and no norm of it."""
    return rms_norm(x, None, 0.0, residual, factor=factor)[1]


def rms_norm_rounded(
    x: torch.Tensor | Unfinished,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    *,
    offset: float | None = None,
) -> tuple[RoundedRows, torch.Tensor]:
    """Compute :func:`rms_norm` of ``(T, H)`` and round its rows to fp8; also returns ``x + residual``."""
    x, residual = _one_result(x, residual)
    given = residual if residual is not None else whole(x)
    if use_triton(given) and reads_fp8(given.device):
        return rms_norm_triton(
            x if residual is not None else given, weight, eps, residual, offset=offset, rounded=True
        )
    return rms_norm_rounded_reference(x, weight, eps, residual, offset=offset)


def rms_norm_rounded_reference(x, weight, eps, residual, *, offset=None):
    total = whole(x) if residual is None else whole(x) + residual
    normed = total if weight is None else rms_norm_reference(total, weight, eps, offset=offset)
    return quantise_rows_reference(normed), total


def rms_norm_triton(x, weight, eps, residual=None, *, offset=None, factor=None, rounded=False):
    """See :func:`rms_norm` and :func:`rms_norm_rounded`."""
    before = x if isinstance(x, Addend) else None
    if before is not None:
        x = before.x
    elif not isinstance(x, SplitSums):
        x = whole(x)
    source, parts = tensor_and_parts(x)
    assert residual is not None or (parts == 0 and before is None and (weight is not None or rounded))
    if parts:
        assert source.is_contiguous()
        # A tensor of the same shape, dtype and device.
        x = residual
    size = x.shape[-1]
    assert x.stride(-1) == 1 and (x.dim() == 2 or not rounded)
    if rounded:
        result = RoundedRows.empty(x.shape[0], size, x.device)
        out, row_scale = result
        total = x
    else:
        result = out = row_scale = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = out
    if residual is not None:
        # Without a norm of the sum the sum is the result.
        if weight is not None or rounded:
            total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        residual = residual.contiguous()
    # Rows of a (T, heads, D) view have two strides; rows of a matrix have one.
    inner = x.shape[-2] if x.dim() == 3 else 1
    rows = x.numel() // size
    if x.dim() not in (2, 3):
        source = x = x.contiguous().view(rows, size)
    if rows:
        block = triton.next_power_of_2(size)
        warps = rounding_warps(block, rows) if rounded else 1 if block <= 256 else 4 if block <= 4096 else 8
        if parts:
            # Each thread has few loads of each part, so that those of all parts are in flight together.
            warps = max(4, min(32, block // 128))
        launch(
            _rms_norm_kernel, (rows,),
            x_ptr=source, residual_ptr=x if residual is None else residual, weight_ptr=x if weight is None else weight,
            **(before or Addend(x, None, 0.0)).arguments(x), NORM=weight is not None,
            factor_ptr=x if factor is None else factor, FACTOR=factor is not None,
            out_ptr=out, row_scale_ptr=row_scale, total_ptr=total,
            outer_stride=x.stride(0), inner_stride=x.stride(-2) if x.dim() == 3 else 0, inner=inner,
            eps=eps, offset=offset or 0.0, rows=rows, OFFSET=offset is not None, PARTS=parts, SIZE=size, BLOCK=block,
            ADD=residual is not None, ROUND=rounded, num_warps=warps, **pdl_options(x),
        )  # fmt: skip
    return result if residual is None and not rounded else (result, total)


# ``rows`` differs between batches; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, before_ptr, factor_ptr, out_ptr, row_scale_ptr, total_ptr, outer_stride,
    inner_stride, inner, eps, offset, before_eps, before_offset, multiplier, rows, NORM: tl.constexpr, BEFORE: tl.constexpr,
    BEFORE_OFFSET: tl.constexpr, MULTIPLY: tl.constexpr, FACTOR: tl.constexpr, OFFSET: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row; row ``i`` is at ``i // inner * outer_stride + i % inner * inner_stride``.

    Args:
        x_ptr: with PARTS ``(PARTS, rows, SIZE)`` float32: its sum over the parts, rounded, is ``x``.
        BEFORE: whether the norm of ``x`` is added to the residual, not ``x``.
        NORM: whether there is a norm of the sum.
    """
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    if NORM:
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    if BEFORE:
        before_weight = tl.load(before_ptr + column, mask=mask, other=0.0)
    launch_dependents_of_one_row(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    if ADD:
        added = tl.load(residual_ptr + row * SIZE + column, mask=mask, other=0.0)
    if PARTS > 0:
        x = load_result(x_ptr, row, rows, column, mask, added.dtype, PARTS, SIZE)
    else:
        source = x_ptr + row // inner * outer_stride + row % inner * inner_stride
        x = tl.load(source + column, mask=mask, other=0.0)
    if BEFORE:
        x = normalised(x, before_weight, before_eps, before_offset, BEFORE_OFFSET, SIZE)
    if MULTIPLY:
        x = multiplied(x, multiplier)
    if ADD:
        x = rounded_sum(x, added)
        if FACTOR:
            x = multiplied(x, tl.load(factor_ptr).to(tl.float32))
        tl.store(total_ptr + row * SIZE + column, x, mask=mask)
    normed = x
    if NORM:
        normed = normalised(x, weight, eps, offset, OFFSET, SIZE)
    if ROUND:
        store_rounded(normed.to(tl.float32), row, column, SIZE, mask, out_ptr, row_scale_ptr)
    elif NORM:
        tl.store(out_ptr + row * SIZE + column, normed, mask=mask)


@triton.jit
def multiplied(x, factor):
    """Return ``x * factor`` in the dtype of ``x``."""
    return (x.to(tl.float32) * factor).to(x.dtype)


@triton.jit
def normalised(x, weight, eps, offset, OFFSET: tl.constexpr, SIZE: tl.constexpr):
    """Return the norm of the row ``x``, in its dtype; lanes beyond ``SIZE`` are zero."""
    return scaled_by_norm(x, inverse_rms(x, 0, eps, SIZE), weight, offset, OFFSET)


@triton.jit
def inverse_rms(x, AXIS: tl.constexpr, eps, SIZE: tl.constexpr):
    """Return ``1 / sqrt(mean(x²) + eps)`` along an axis of ``SIZE`` elements and zeros; in a tile the axis keeps
    a length of 1."""
    wide = x.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(wide * wide, axis=AXIS, keep_dims=AXIS > 0) / SIZE + eps)


@triton.jit
def scaled_by_norm(x, inverse, weight, offset, OFFSET: tl.constexpr):
    """Return ``x * inverse * (weight + offset)`` in the dtype of ``x``, rounded as :func:`rms_norm` says."""
    normed = x.to(tl.float32) * inverse
    weight = weight.to(tl.float32)
    if OFFSET:
        weight += offset
    else:
        normed = normed.to(x.dtype).to(tl.float32)
    return (normed * weight).to(x.dtype)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of each head of queries and of keys.

    Attributes:
        q_weight, k_weight: ``(D,)``.
        eps, offset: see :func:`rms_norm`.
        last: they come behind the rotation, not before it (Hunyuan).
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float
    offset: float | None = None
    last: bool = False


def norm_arguments(norms: HeadNorms | None, q: torch.Tensor) -> dict[str, Any]:
    """Arguments of a kernel for norms of heads, or for none. ``q`` stands in for what is not accessed."""
    given = HeadNorms(q, q, 0.0) if norms is None else norms
    return {
        "q_norm_ptr": given.q_weight, "k_norm_ptr": given.k_weight, "eps": given.eps,
        "offset": given.offset or 0.0, "NORM": norms is not None, "OFFSET": given.offset is not None,
        "LAST": given.last,
    }  # fmt: skip


def head_norms(q: torch.Tensor, k: torch.Tensor, norms: HeadNorms) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`rms_norm` of each head of queries and keys, in one launch.

    Args:
        q: ``(T, Hq, D)``, last dimension contiguous.
        k: ``(T, Hkv, D)``, likewise.

    Returns:
        Both norms, contiguous.
    """
    return (head_norms_triton if use_triton(q) else head_norms_reference)(q, k, norms)


def head_norms_reference(q, k, norms):
    return (
        rms_norm_reference(q, norms.q_weight, norms.eps, offset=norms.offset),
        rms_norm_reference(k, norms.k_weight, norms.eps, offset=norms.offset),
    )


def head_norms_triton(q, k, norms):
    (tokens, q_heads, size), k_heads = q.shape, k.shape[1]
    assert q.stride(2) == k.stride(2) == 1 and k.shape == (tokens, k_heads, size)
    q_out, k_out = (torch.empty(part.shape, dtype=q.dtype, device=q.device) for part in (q, k))
    block = triton.next_power_of_2(size)
    if tokens:
        launch(
            _head_norms_kernel, ((q_heads + k_heads) * tokens,),
            q_ptr=q, k_ptr=k, q_weight_ptr=norms.q_weight, k_weight_ptr=norms.k_weight,
            q_out_ptr=q_out, k_out_ptr=k_out,
            q_stride=q.stride(0), q_head_stride=q.stride(1), k_stride=k.stride(0), k_head_stride=k.stride(1),
            eps=norms.eps, offset=norms.offset or 0.0, OFFSET=norms.offset is not None,
            Q_HEADS=q_heads, K_HEADS=k_heads, SIZE=size, BLOCK=block, num_warps=1 if block <= 256 else 4, **pdl_options(q),
        )  # fmt: skip
    return q_out, k_out


@triton.jit
def _head_norms_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, q_stride, q_head_stride, k_stride,
    k_head_stride, eps, offset, OFFSET: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per head and token, queries first."""
    wait_for_previous(PDL)
    head = tl.program_id(0) % (Q_HEADS + K_HEADS)
    token = (tl.program_id(0) // (Q_HEADS + K_HEADS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    if head < Q_HEADS:
        x = tl.load(q_ptr + token * q_stride + head * q_head_stride + column, mask=mask, other=0.0)
        weight = tl.load(q_weight_ptr + column, mask=mask, other=0.0)
        normed = normalised(x, weight, eps, offset, OFFSET, SIZE)
        tl.store(q_out_ptr + (token * Q_HEADS + head) * SIZE + column, normed, mask=mask)
    else:
        head -= Q_HEADS
        x = tl.load(k_ptr + token * k_stride + head * k_head_stride + column, mask=mask, other=0.0)
        weight = tl.load(k_weight_ptr + column, mask=mask, other=0.0)
        normed = normalised(x, weight, eps, offset, OFFSET, SIZE)
        tl.store(k_out_ptr + (token * K_HEADS + head) * SIZE + column, normed, mask=mask)
