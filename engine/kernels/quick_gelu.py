"""CLIP's approximation of GELU in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous

_BLOCK = 2048


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Compute ``x * sigmoid(1.702 x)``; each operation rounds to the input's dtype as in torch.

    Args:
        x: any shape, contiguous.

    Returns:
        Shape and dtype of ``x``.
    """
    return (quick_gelu_triton if use_triton(x) else quick_gelu_reference)(x)


def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def quick_gelu_triton(x: torch.Tensor) -> torch.Tensor:
    assert x.is_contiguous()
    out = torch.empty_like(x)
    if x.numel():
        launch(
            _quick_gelu_kernel, (triton.cdiv(x.numel(), _BLOCK),),
            x_ptr=x, out_ptr=out, size=x.numel(), BLOCK=_BLOCK, num_warps=4, **pdl_options(x),
        )  # fmt: skip
    return out


@triton.jit
def _quick_gelu_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < size, other=0.0)
    wide = x.to(tl.float32)
    inner = (1.702 * wide).to(x.dtype).to(tl.float32)
    gate = tl.sigmoid(inner).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + offset, (wide * gate).to(x.dtype), mask=offset < size)
