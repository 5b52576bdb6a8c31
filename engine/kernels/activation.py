"""Activations within kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Of float32 ``x``: ``silu``; ``gelu``; ``gelu_tanh``, its tanh approximation; ``quick_gelu``, CLIP's."""
    if ACTIVATION == "silu":
        result = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "quick_gelu")
        result = x * tl.sigmoid(1.702 * x)
    return result
