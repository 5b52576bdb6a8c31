"""Which sequence of a batch a program works for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_sequence(query_start_ptr, tile, sequences, TOKENS: tl.constexpr):
    """The sequence that a tile belongs to: the last whose first tile, ``start // TOKENS + s``, is not later."""
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low
