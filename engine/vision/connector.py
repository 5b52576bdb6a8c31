"""From the tower's features to rows of the language model's width."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.build import BuildContext
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm, RMSNorm


class MLPConnector(nn.Module):
    """``fc2(act(fc1(x)))`` from ``in_features`` over ``hidden`` to ``out_features``."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        build: BuildContext,
        *,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(in_features, hidden, build, bias=bias)
        self.fc2 = Linear(hidden, out_features, build, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1.activated(x, self.activation))


class PatchMerger(nn.Module):
    """Normalises, joins each ``group`` consecutive tokens into one, and projects it.

    ``(N, width)`` to ``(N / group, out_features)``. ``norm_after`` normalises the joined token, not each.
    """

    def __init__(
        self,
        norm: LayerNorm | RMSNorm,
        width: int,
        group: int,
        out_features: int,
        build: BuildContext,
        *,
        norm_after: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.group = group
        self.norm_after = norm_after
        self.mlp = MLPConnector(width * group, width * group, out_features, build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_after:
            return self.mlp(self.norm(x.view(-1, self.group * x.shape[-1])))
        return self.mlp(self.norm(x).view(-1, self.group * x.shape[-1]))
