"""Sums of a linear layer that its consumer adds up."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
        """Shape of the result."""
        return self.parts.shape[1:]

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def total(self) -> torch.Tensor:
        """Add up the parts, first to last: ``(T, N)``."""
        return self.parts.sum(0).to(self.dtype)


def whole(x: torch.Tensor | SplitSums) -> torch.Tensor:
    """Return ``x`` as a tensor."""
    return x.total() if isinstance(x, SplitSums) else x
