"""The connector that trades resolution for width."""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.build import BuildContext
from engine.layers.linear import Linear


class PixelShuffleConnector(nn.Module):
    """``(images, side², width)`` to ``(images, (side / factor)², out_features)``: every square of ``factor``
    by ``factor`` features becomes one row, its features side by side, row by row; then one projection.

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
