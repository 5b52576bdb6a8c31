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
