"""Connectors that trade resolution for width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.build import BuildContext
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm
from engine.vision.connector import MLPConnector
from engine.vision.crops_config import GatedSquares
from engine.vision.mlp_config import MLPConfig

_NORM_EPS = 1e-5


def shuffled(x: torch.Tensor, side: int, factor: int) -> torch.Tensor:
    """Join each square of ``factor`` by ``factor`` features, row by row.

    Args:
        x: ``(images, side², width)``.
        side: features along an image's side, a multiple of ``factor``.

    Returns:
        ``(images, (side / factor)², width * factor²)``.
    """
    small = side // factor
    squares = x.unflatten(1, (small, factor, small, factor)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


class PixelShuffleConnector(nn.Module):
    """Projects each square of features to one row of ``out_features``, as :func:`shuffled` joins them."""

    def __init__(self, width: int, side: int, factor: int, out_features: int, build: BuildContext) -> None:
        super().__init__()
        self.side, self.factor = side, factor
        self.proj = Linear(width * factor**2, out_features, build, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(shuffled(x, self.side, self.factor))


class ShuffledMLPConnector(nn.Module):
    """Pixel shuffle with a LayerNorm and an MLP as the projection."""

    def __init__(
        self, width: int, side: int, factor: int, mlp: MLPConfig, out_features: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.side, self.factor = side, factor
        self.norm = LayerNorm(width * factor**2, _NORM_EPS, build)
        self.mlp = MLPConnector(width * factor**2, mlp, out_features, build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(shuffled(x, self.side, self.factor)))


class GatedShuffleConnector(nn.Module):
    """Pixel shuffle with ``down(silu(gate(x)) * up(x))`` as the projection, perhaps after a LayerNorm."""

    def __init__(
        self, width: int, side: int, factor: int, config: GatedSquares, out_features: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.side, self.factor = side, factor
        features, inner = width * factor**2, config.intermediate_size
        self.norm = None if config.norm_eps is None else LayerNorm(features, config.norm_eps, build)
        self.up_gate_proj = Linear(features, 2 * inner, build)
        self.down_proj = Linear(inner, out_features, build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = shuffled(x, self.side, self.factor)
        up, gate = self.up_gate_proj(x if self.norm is None else self.norm(x)).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
