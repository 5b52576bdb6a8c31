"""The connector that trades resolution for width."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.build import BuildContext
from engine.layers.linear import Linear


class PixelShuffleConnector(nn.Module):
    """Joins each square of ``factor`` by ``factor`` features, row by row, and projects it to one row.

    Input ``(images, side², width)``, output ``(images, (side / factor)², out_features)``.

    Args:
        side: features along an image's side, a multiple of ``factor``.
    """

    def __init__(self, width: int, side: int, factor: int, out_features: int, build: BuildContext) -> None:
        super().__init__()
        self.side, self.factor = side, factor
        self.proj = Linear(width * factor**2, out_features, build, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.side // self.factor
        squares = x.unflatten(1, (small, self.factor, small, self.factor)).transpose(2, 3)
        return self.proj(squares.flatten(3).flatten(1, 2))
