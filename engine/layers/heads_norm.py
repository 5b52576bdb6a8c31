"""Norms of a token's queries, or keys, whose weights differ between heads."""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels.rms_norm import rms_norm, scaled_by_weight
from engine.layers.build import BuildContext, WeightSlot
from engine.layers.linear import FusedPart


class HeadsNorm(nn.Module):
    """Computes :func:`~engine.kernels.rms_norm.rms_norm`, where the mean is over the heads of all ranks.

    Each rank has as many heads as the others. Where there are more ranks than KV heads, each of these is on
    equally many ranks, which leaves the mean as it is.

    Args:
        part: the projection that it norms.
    """

    def __init__(self, part: FusedPart, eps: float, offset: float | None, build: BuildContext) -> None:
        super().__init__()
        self.tp, self.eps, self.offset = build.tp, eps, offset
        self.total, self.own = part.total, slice(part.start, part.start + part.size)
        self.weight = build.parameter(part.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm this rank's heads ``(T, heads * head_dim)``; it may be strided."""
        if self.tp.size == 1:
            return rms_norm(x, self.weight, self.eps, offset=self.offset)
        wide = x.float()
        mean = self.tp.all_reduce(wide.square().mean(-1, keepdim=True)) / self.tp.size
        return scaled_by_weight(wide * torch.rsqrt(mean + self.eps), self.weight, self.offset, x.dtype)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [WeightSlot(prefix + "weight", (self.total,), [((self.own,), self.weight.data)])]


class HeadLayerNorms(nn.Module):
    """Computes ``weight * (x - mean(x)) / sqrt(var(x) + eps)`` of each head.

    Args:
        part: the projection that it norms.
        head_dim: numbers of a head.
    """

    def __init__(self, part: FusedPart, head_dim: int, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.eps = eps
        self.shape = part.total // head_dim, head_dim
        self.own = slice(part.start // head_dim, (part.start + part.size) // head_dim), slice(0, head_dim)
        self.weight = build.parameter(part.size // head_dim, head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm this rank's heads ``(T, heads * head_dim)`` in float32, as Transformers does."""
        heads = F.layer_norm(x.float().unflatten(-1, self.weight.shape), self.shape[1:], eps=self.eps)
        return (heads * self.weight.float()).to(x.dtype).flatten(-2)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [WeightSlot(prefix + "weight", self.shape, [(self.own, self.weight.data)])]
