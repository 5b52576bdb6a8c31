"""Activation functions of MLPs: torch's, by their Hugging Face names, and the same inside kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.quick_gelu import quick_gelu


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Compute GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


@triton.jit
def sigmoid(x):
    """Compute the logistic function of float32 ``x`` in half the instructions of ``tl.sigmoid``, whose division and
    exponential take care of operands that don't occur here: the root is of a number from 1 on."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply an activation to float32 ``x``.

    ACTIVATION: a key of ``ACTIVATIONS``.
    """
    if ACTIVATION == "silu":
        result = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        result = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        result = tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "quick_gelu")
        result = x * sigmoid(1.702 * x)
    return result
