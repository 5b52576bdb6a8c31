"""Connectors: from a tower's features to embedding rows of the language model's width."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import LayerNorm, RMSNorm, UnitNorm
from engine.vision.mlp_config import MLPConfig
from engine.vision.native_config import (
    AdapterConfig,
    FramedMergerConfig,
    GatedMergerConfig,
    SquaresConfig,
    TemporalMergerConfig,
)

_MERGER_NORM_EPS = 1e-5


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


class SquareMerger(nn.Module):
    """Normalises features, projects each square of them to one feature, and that to a row by an MLP.

    Args:
        width: of a feature.
    """

    def __init__(
        self, width: int, squares: SquaresConfig, mlp: MLPConfig, out_features: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.side = squares.side
        self.norm = RMSNorm(width, squares.norm_eps, build)
        self.reduction = Linear(width * self.side**2, width, build, bias=False)
        self.mlp = MLPConnector(width, mlp, out_features, build)

    def forward(self, x: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Rows ``(sum of (h // side) * (w // side), out_features)``.

        Args:
            x: ``(sum of h * w, width)``, the features of frames one after the other, line by line.
            grids: ``(h, w)`` of each frame, in patches.
        """
        frames = self.norm(x).split([h * w for h, w in grids])
        squares = [self._squares(part, *grid) for part, grid in zip(frames, grids, strict=True)]
        return self.mlp(self.reduction(squares[0] if len(squares) == 1 else torch.cat(squares)))

    def _squares(self, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """``(squares, width * side²)``: a feature's numbers of all patches lie together, as ``F.unfold`` puts
        them."""
        side = self.side
        down, along = h // side, w // side
        grid = x.view(h, w, -1)[: down * side, : along * side]
        split = grid.unflatten(0, (down, side)).unflatten(2, (along, side))
        return split.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)


class PatchMerger(nn.Module):
    """Normalises features, joins each ``group`` consecutive ones, and projects the result by an MLP.

    Input ``(N, width)``, output ``(N / group, out_features)``.

    Args:
        norm: over ``width`` features, or over ``width * group`` with ``norm_after``.
        norm_after: whether joined features are normalised instead of single ones.
        mlp: of the projection.
        hidden: width of its hidden layer; that of joined features if None.
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
        mlp: MLPConfig = MLPConfig(),
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.group = group
        self.norm_after = norm_after
        joined = width * group
        self.mlp = MLPConnector(joined, mlp, out_features, build, hidden=hidden or joined)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_after:
            return self.mlp(self.norm(x.view(-1, self.group * x.shape[-1])))
        return self.mlp(self.norm(x).view(-1, self.group * x.shape[-1]))


class GatedMerger(nn.Module):
    """Projects each ``group`` consecutive features to one, and that by a matrix, a norm, GELU and a gated MLP
    (GLM).

    Input ``(N, width)``, output ``(N / group, out_features)``.
    """

    def __init__(
        self, width: int, group: int, config: GatedMergerConfig, out_features: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.group = group
        self.reduction = Linear(width * group, out_features, build)
        self.proj = Linear(out_features, out_features, build, bias=False)
        self.norm = LayerNorm(out_features, _MERGER_NORM_EPS, build)
        self.mlp = GatedMLP(out_features, config.intermediate_size, config.activation, build, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The convolution's kernel lies behind its channels.
        squares = x.view(-1, self.group, x.shape[-1]).transpose(1, 2).flatten(1)
        return self.mlp(F.gelu(self.norm(self.proj(self.reduction(squares)))))


class AdapterMerger(nn.Module):
    """Projects each ``group`` consecutive features by two layers with activations, and that to a row, which
    is divided by its root mean square (Muse Glimmer).

    Input ``(N, width)``, output ``(N / group, out_features)``.
    """

    def __init__(
        self, width: int, group: int, config: AdapterConfig, out_features: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.group, self.activation = group, config.activation
        self.fc1 = Linear(width * group, config.width, build, bias=False)
        self.fc2 = Linear(config.width, config.width, build, bias=False)
        self.proj = Linear(config.width, out_features, build, bias=False)
        self.norm = UnitNorm(out_features, config.norm_eps, build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A feature's numbers of all patches lie together.
        squares = x.view(-1, self.group, x.shape[-1]).transpose(1, 2).flatten(1)
        inner = self.fc2.activated(self.fc1.activated(squares, self.activation), self.activation)
        return self.norm(self.proj(inner))


class FramedMerger(nn.Module):
    """Projects each square of features to one, and that to a row; a learned feature ends each line of
    squares, and learned rows begin and end each image (HunyuanOCR).

    Args:
        width: of a feature.
        side: of a square, in patches.
    """

    def __init__(
        self, width: int, side: int, config: FramedMergerConfig, out_features: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.side = side
        self.norm = RMSNorm(width, config.norm_eps, build)
        self.squares = MLPConnector(
            width * side**2, MLPConfig(config.activation), 4 * width, build, hidden=2 * width
        )
        self.newline = build.parameter(4 * width)
        self.proj = Linear(4 * width, out_features, build)
        self.begin, self.end = build.parameter(out_features), build.parameter(out_features)
        self.out_norm = RMSNorm(out_features, config.norm_eps, build)

    def forward(self, x: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Rows ``(sum of (h / side) * (w / side + 1) + 2, out_features)``.

        Args:
            x: ``(sum of h * w, width)``, the features of images one after the other, square by square.
            grids: ``(h, w)`` of each image, in patches.
        """
        # The convolution's kernel lies behind its channels.
        squares = self.norm(x).view(-1, self.side**2, x.shape[-1]).transpose(1, 2).flatten(1)
        sizes = [(h // self.side, w // self.side) for h, w in grids]
        parts = self.squares(squares).split([h * w for h, w in sizes])
        ends = [self.newline.expand(h, 1, -1) for h, _ in sizes]
        lines = [
            torch.cat([part.unflatten(0, size), end], dim=1).flatten(0, 1)
            for part, size, end in zip(parts, sizes, ends, strict=True)
        ]
        rows = self.proj(torch.cat(lines)).split([len(part) for part in lines])
        framed = [each for part in rows for each in (self.begin[None], part, self.end[None])]
        return self.out_norm(torch.cat(framed))

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + name, getattr(self, name)) for name in ("newline", "begin", "end")]


class _NormedMLP(nn.Module):
    """``norm(fc2(gelu(fc1(x))))``, whose inner width is that of the result."""

    def __init__(self, in_features: int, out_features: int, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.mlp = MLPConnector(in_features, MLPConfig("gelu"), out_features, build)
        self.norm = LayerNorm(out_features, eps, build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mlp(x))


class TemporalMerger(nn.Module):
    """Merges squares of features by one MLP, then those at the same place of several frames by another one,
    and projects the result to a row (Ernie 4.5 VL).

    Args:
        width: of a feature.
        group: features of a square.
    """

    def __init__(
        self, width: int, group: int, config: TemporalMergerConfig, out_features: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.group, self.frames = group, config.frames
        inner = width * group
        self.spatial = _NormedMLP(inner, inner, config.norm_eps, build)
        self.temporal = _NormedMLP(inner * config.frames, inner, config.norm_eps, build)
        self.proj = Linear(inner, out_features, build)
        self.out_norm = RMSNorm(out_features, config.out_norm_eps, build)

    def forward(self, x: torch.Tensor, grids: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Rows ``(sum of ceil(t / frames) * h * w / group, out_features)``.

        Args:
            x: ``(sum of t * h * w, width)``, the features of items one after the other, frame by frame and
                square by square.
            grids: ``(t, h, w)`` of each item, in patches. An image, with ``t`` 1, stands for all frames; of
                others ``t`` is a multiple of ``frames``.
        """
        squares = self.spatial(x.view(-1, self.group * x.shape[-1]))
        sizes = [(t, h * w // self.group) for t, h, w in grids]
        parts = squares.split([t * size for t, size in sizes])
        steps = [
            part.view(-1, self.frames if t > 1 else 1, size, part.shape[-1]).expand(-1, self.frames, -1, -1)
            for part, (t, size) in zip(parts, sizes, strict=True)
        ]
        joined = torch.cat([step.transpose(1, 2).flatten(2).flatten(0, 1) for step in steps])
        return self.out_norm(self.proj(self.temporal(joined)))
