"""Scales of fp8 weights inside kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.fp8 import Scale


def scale_arguments(x: torch.Tensor, scale: Scale | None) -> dict[str, Any]:
    """Arguments of a kernel for the scales of its weight.

    ``GROUP`` is -1 without scales, 0 for one scale an output, and otherwise the inputs of a group.

    Args:
        x: stands in for a tensor that is not accessed.
    """
    if scale is None:
        return {"scale_ptr": x, "groups": 0, "GROUP": -1}
    groups = scale.values.shape[1]
    assert scale.values.is_contiguous()
    return {"scale_ptr": scale.values, "groups": groups, "GROUP": 0 if groups == 1 else scale.group}


@triton.jit
def load_scales(scale_ptr, output, groups, group, mask):
    """Load the scales of outputs and groups of inputs, which broadcast."""
    return tl.load(scale_ptr + output.to(tl.int64) * groups + group, mask=mask, other=0.0)


@triton.jit
def times_scales(products, scale_ptr, output, output_mask, groups, first, inputs, GROUP: tl.constexpr):
    """Multiply products by the scales of their groups, of which each is loaded once, not for each product.

    Args:
        products: of outputs and consecutive inputs from ``first`` on, which begins a group or lies with all of them
            in one.
    """
    OUTPUTS: tl.constexpr = products.shape[0]
    INPUTS: tl.constexpr = products.shape[1]
    WIDTH: tl.constexpr = min(GROUP, INPUTS)
    begin = first + tl.arange(0, INPUTS // WIDTH)[None, :] * WIDTH
    mask = output_mask[:, None] & (begin < inputs)
    scale = load_scales(scale_ptr, output[:, None], groups, begin // GROUP, mask)
    scaled = tl.reshape(products, [OUTPUTS, INPUTS // WIDTH, WIDTH]) * scale[:, :, None]
    return tl.reshape(scaled, [OUTPUTS, INPUTS])
