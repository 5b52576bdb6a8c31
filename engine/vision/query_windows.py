"""A connector whose learned queries attend to features within windows (Granite 4 Vision).

Each projector is a Q-Former (Li et al., BLIP-2, 2023) of a few blocks, with norms behind attention and MLP.
"""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels.activation import ACTIVATIONS
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm
from engine.vision.crops_config import QueryWindows

_NORM_EPS = 1e-6
#: Places in a square of 2x2 features.
_CORNERS = (0, 0), (0, 1), (1, 0), (1, 1)


class WindowConnector(nn.Module):
    """Makes rows ``(crops, side² / 4, parts * out_features)`` of features ``(crops, side², n * width)``.

    Args:
        side: features along a crop's side.
        out_features: width of a part of a row.
    """

    def __init__(self, config: QueryWindows, side: int, out_features: int, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.layerwise = nn.ModuleList(
            Projector(config, side, None, out_features, build) for _ in config.layers
        )
        self.spatial = nn.ModuleList(
            Projector(config, side, corner, out_features, build) for corner in _CORNERS
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        states = features.split(self.config.width, dim=-1)
        read = [*self.config.layers, *[self.config.spatial] * len(_CORNERS)]
        projectors = [*self.layerwise, *self.spatial]
        return torch.cat([projectors[number](states[read[number]]) for number in self.config.order], dim=-1)


class Projector(nn.Module):
    """One part of the rows; see :class:`WindowConnector`.

    Args:
        corner: of each square of features, with which its query begins; None for their average.
    """

    def __init__(
        self,
        config: QueryWindows,
        side: int,
        corner: tuple[int, int] | None,
        out_features: int,
        build: BuildContext,
    ) -> None:
        super().__init__()
        width = config.width
        self.grid, self.window, self.corner = side, config.side, corner
        self.norm = LayerNorm(width, _NORM_EPS, build)
        self.query = build.parameter(config.side**2, width)
        self.positions = build.parameter(4 * config.side**2, width)
        self.query_norm = LayerNorm(width, config.norm_eps, build)
        self.blocks = nn.ModuleList(QueryBlock(config, build) for _ in range(config.num_blocks))
        self.out = Linear(width, out_features, build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features ``(crops, side², width)`` to ``(crops, side² / 4, out_features)``."""
        grid = self.norm(x).unflatten(1, (self.grid, self.grid))
        squares = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        if self.corner is None:
            small = squares.float().mean((2, 4)).to(x.dtype)
        else:
            small = squares[:, :, self.corner[0], :, self.corner[1]]
        keys = _windows(grid, 2 * self.window) + self.positions
        queries = self.query_norm(_windows(small, self.window) + self.query)
        for block in self.blocks:
            queries = block(queries, keys)
        return self.out(_joined(queries, self.grid // 2, self.window))

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [
            plain_slot(prefix + name, getattr(self, name), reshape=True) for name in ("query", "positions")
        ]


class QueryBlock(nn.Module):
    """Attention of a window's queries to each other, then to its features, and an MLP."""

    def __init__(self, config: QueryWindows, build: BuildContext) -> None:
        super().__init__()
        width = config.width
        self.attn, self.cross = QueryAttention(config, build), QueryAttention(config, build)
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = Linear(width, config.intermediate_size, build)
        self.fc2 = Linear(config.intermediate_size, width, build)
        self.norm = LayerNorm(width, config.norm_eps, build)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        attended = self.cross(self.attn(queries, queries), keys)
        return self.norm(self.fc2(self.activation(self.fc1(attended))) + attended)


class QueryAttention(nn.Module):
    """Attention of ``(windows, queries, width)`` to ``(windows, keys, width)``, added to the queries, and a
    norm."""

    def __init__(self, config: QueryWindows, build: BuildContext) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(config.width, config.width, build) for _ in range(4)
        )
        self.norm = LayerNorm(config.width, config.norm_eps, build)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        parts = self.q_proj(queries), self.k_proj(keys), self.v_proj(keys)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(self.o_proj(attended) + queries)


def _windows(grid: torch.Tensor, side: int) -> torch.Tensor:
    """Cut ``(crops, height, width, features)`` into ``(windows, side², features)``, line by line."""
    split = grid.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return split.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _joined(windows: torch.Tensor, grid: int, side: int) -> torch.Tensor:
    """Join ``(windows, side², features)`` to ``(crops, grid², features)``, line by line."""
    count = grid // side
    split = windows.unflatten(1, (side, side)).unflatten(0, (-1, count, count))
    return split.transpose(2, 3).flatten(1, 2).flatten(2, 3).flatten(1, 2)
