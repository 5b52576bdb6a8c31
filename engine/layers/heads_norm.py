"""The norm of all heads of a token's queries, or keys, together."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from engine.kernels.rms_norm import rms_norm
from engine.layers.build import BuildContext, WeightSlot
from engine.layers.linear import FusedPart


class HeadsNorm(nn.Module):
    """Computes ``weight * x / sqrt(mean(x²) + eps)``, where the mean is over the heads of all ranks.

    Each rank has as many heads as the others. Where there are more ranks than KV heads, each of these is on
    equally many ranks, which leaves the mean as it is.

    Args:
        part: the projection that it norms.
    """

    def __init__(self, part: FusedPart, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.tp, self.eps = build.tp, eps
        self.total, self.own = part.total, slice(part.start, part.start + part.size)
        self.weight = build.parameter(part.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm this rank's heads ``(T, heads * head_dim)``; it may be strided."""
        if self.tp.size == 1:
            return rms_norm(x, self.weight, self.eps)
        wide = x.float()
        mean = self.tp.all_reduce(wide.square().mean(-1, keepdim=True)) / self.tp.size
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [WeightSlot(prefix + "weight", (self.total,), [((self.own,), self.weight.data)])]
