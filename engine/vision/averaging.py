"""A connector that averages squares of features (Gemma 3)."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.norm import RMSNorm


class AveragingConnector(nn.Module):
    """Projects the normalised average of each square of features to one row of ``out_features``.

    Args:
        width: of a feature.
        side: features along an image's side, a multiple of ``factor``.
        factor: features along a square's side.
        eps: of the norm, whose weights are stored less one.
    """

    def __init__(
        self, width: int, side: int, factor: int, eps: float, out_features: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.side, self.factor = side, factor
        self.norm = RMSNorm(width, eps, build, offset=1.0)
        self.weight = build.parameter(width, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows ``(images, (side / factor)², out_features)`` of features ``(images, side², width)``."""
        small = self.side // self.factor
        squares = x.unflatten(1, (small, self.factor, small, self.factor))
        return self.norm(squares.mean((2, 4)).flatten(1, 2)) @ self.weight

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "weight", self.weight)]
