"""The RMS norm before a mixture of experts and the logits of its router, for few tokens in one launch.

Apart they are launches of some microseconds, of which a decode step has two in each layer. Each program normalises the row itself, which takes less than a launch,
and loads its row of the router's weight meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.rms_norm import normalised, rms_norm
from engine.kernels.router_logits import router_logits

#: With more tokens the router's weight is read too often.
MAX_TOKENS = 8


def norm_router(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    *,
    offset: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the RMS norm of ``x + residual``, that sum, and the router's logits of the norm.

    Args:
        x: ``(T, H)``, last dimension contiguous.
        residual: ``(T, H)`` contiguous; None adds nothing.
        norm: ``(H,)``, scale of the norm.
        eps, offset: see :func:`~engine.kernels.rms_norm.rms_norm`.
        weight: ``(E, H)`` float32 contiguous.

    Returns:
        The norm and the sum, ``(T, H)`` in the dtype of ``x``, and the logits, ``(T, E)`` float32 contiguous.
    """
    few = 0 < len(x) <= MAX_TOKENS and use_triton(x)
    return (norm_router_triton if few else norm_router_apart)(x, residual, norm, eps, weight, offset)


def norm_router_apart(x, residual, norm, eps, weight, offset):
    """Compute :func:`norm_router` by the kernels of the norm and of the logits."""
    if residual is None:
        normed, total = rms_norm(x, norm, eps, offset=offset), x
    else:
        normed, total = rms_norm(x, norm, eps, residual, offset=offset)
    return normed, total, router_logits(normed, weight)


def norm_router_triton(x, residual, norm, eps, weight, offset):
    tokens, size = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == size
    assert residual is None or residual.is_contiguous()
    normed = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    logits = torch.empty((tokens, len(weight)), dtype=torch.float32, device=x.device)
    launch(
        _norm_router_kernel, (len(weight), tokens),
        x_ptr=x, residual_ptr=x if residual is None else residual, norm_ptr=norm, weight_ptr=weight,
        normed_ptr=normed, total_ptr=total, logits_ptr=logits, experts=len(weight), x_stride=x.stride(0),
        eps=eps, offset=offset or 0.0, OFFSET=offset is not None, ADD=residual is not None, SIZE=size,
        BLOCK=triton.next_power_of_2(size), num_warps=4, **pdl_options(x),
    )  # fmt: skip
    return normed, total, logits


@triton.jit
def _norm_router_kernel(
    x_ptr, residual_ptr, norm_ptr, weight_ptr, normed_ptr, total_ptr, logits_ptr, experts, x_stride, eps,
    offset, OFFSET: tl.constexpr, ADD: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per expert and token; the first expert's stores the norm and the sum."""
    expert, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mask = lane < SIZE
    weight = tl.load(weight_ptr + expert * SIZE + lane, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + lane, mask=mask, other=0.0)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + token * x_stride + lane, mask=mask, other=0.0)
    if ADD:
        added = tl.load(residual_ptr + token * SIZE + lane, mask=mask, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
    normed = normalised(x, norm, eps, offset, OFFSET, SIZE)
    tl.store(logits_ptr + token * experts + expert, tl.sum(normed.to(tl.float32) * weight, axis=0))
    if expert == 0:
        tl.store(normed_ptr + token * SIZE + lane, normed, mask=mask)
        if ADD:
            tl.store(total_ptr + token * SIZE + lane, x, mask=mask)
