"""Connectors: from a tower's features to embedding rows of the language model's width."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.build import BuildContext
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm, RMSNorm
from engine.vision.mlp_config import MLPConfig


class MLPConnector(nn.Module):
    """``fc2(act(fc1(x)))`` from ``in_features`` to ``out_features``.

    Args:
        hidden: width of the hidden layer; ``out_features`` if None.
    """

    def __init__(
        self,
        in_features: int,
        config: MLPConfig,
        out_features: int,
        build: BuildContext,
        *,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = config.activation
        self.fc1 = Linear(in_features, hidden or out_features, build, bias=config.bias)
        self.fc2 = Linear(hidden or out_features, out_features, build, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1.activated(x, self.activation))


class PatchMerger(nn.Module):
    """Normalises features, joins each ``group`` consecutive ones, and projects the result by an MLP.

    Input ``(N, width)``, output ``(N / group, out_features)``.

    Args:
        norm: over ``width`` features, or over ``width * group`` with ``norm_after``.
        norm_after: whether joined features are normalised instead of single ones.
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
        self.mlp = MLPConnector(width * group, MLPConfig(), out_features, build, hidden=width * group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_after:
            return self.mlp(self.norm(x.view(-1, self.group * x.shape[-1])))
        return self.mlp(self.norm(x).view(-1, self.group * x.shape[-1]))
