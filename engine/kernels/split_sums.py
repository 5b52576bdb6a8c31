"""Results of layers that their consumer, a norm that adds a residual, finishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl


class Unfinished(Protocol):
    """A result ``(T, N)`` that is not computed to its end: a norm that reads it can do that meanwhile."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the result."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the result."""

    @property
    def device(self) -> torch.device: ...

    def total(self) -> torch.Tensor:
        """Compute the result."""


@dataclass(frozen=True, slots=True)
class SplitSums:
    """The result of a linear layer whose inputs several programs share (split-K), before it is added up.

    To add it up where it is made, the last program of a tile would wait for the others. Its consumer adds it up
    while it loads it.

    Attributes:
        parts: ``(S, T, N)`` float32, contiguous: each share's sums. Their total, rounded to ``dtype``, is the result.
        dtype: of the result.
    """

    parts: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.parts.shape[1:]

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def total(self) -> torch.Tensor:
        """Add up the parts, first to last: ``(T, N)``."""
        return self.parts.sum(0).to(self.dtype)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two results ``(T, N)`` that are added to a residual, ``first`` first; each sum is rounded."""

    first: torch.Tensor | SplitSums
    second: torch.Tensor | SplitSums

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def shape(self) -> torch.Size:
        return self.first.shape

    @property
    def device(self) -> torch.device:
        return self.first.device

    def total(self) -> torch.Tensor:
        """Add the two to each other."""
        return whole(self.first) + whole(self.second)


def whole(x: torch.Tensor | Unfinished) -> torch.Tensor:
    """Return ``x`` as a tensor."""
    return x if isinstance(x, torch.Tensor) else x.total()


def tensor_and_parts(x: torch.Tensor | SplitSums) -> tuple[torch.Tensor, int]:
    """Return what a kernel reads of ``x``, and for :func:`load_result` the number of parts: 0 for a tensor."""
    return (x.parts, len(x.parts)) if isinstance(x, SplitSums) else (x, 0)


@triton.jit
def load_result(ptr, row, rows, column, mask, dtype, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Load a row of a contiguous tensor ``(rows, SIZE)``, or add up that of ``PARTS`` parts and round it to ``dtype``."""
    if PARTS > 0:
        # All are loaded before the first is used.
        parts = ()
        for part in tl.static_range(PARTS):
            parts = parts + (tl.load(ptr + (part * rows + row) * SIZE + column, mask=mask, other=0.0),)
        sums = parts[0]
        for part in tl.static_range(1, PARTS):
            sums += parts[part]
        result = sums.to(dtype)
    else:
        result = tl.load(ptr + row * SIZE + column, mask=mask, other=0.0)
    return result


@triton.jit
def rounded_sum(x, y):
    """Add two rows of one dtype, and round to it."""
    return (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
