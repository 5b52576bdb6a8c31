"""Granite-Docling's encoder: tiles to coarse or fine rows, and beside them features of several depths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.families.granite_docling.config import TilesVisionConfig
from engine.graphs import Capture
from engine.kernels.patchify import patchify
from engine.layers.build import BuildContext
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.mlp_config import MLPConfig
from engine.vision.pixel_shuffle import ShuffledMLPConnector, shuffled
from engine.vision.pixels import PixelInput, blank, unfit
from engine.vision.resampler import sine_positions
from engine.vision.segments import VisionSegments
from engine.vision.transformer import VisionTransformer

_EPS = 1e-5


class TilesEncoder(nn.Module):
    """Encodes uint8 tiles ``(tiles, size, size, 3)`` to rows ``(tiles * rows_per_tile, width)``.

    ``width`` is ``out_features``, and as many numbers again for each deepstack layer. The number of an item's
    rows tells which connector makes them. The first number of its grid is the number of its tiles.
    """

    def __init__(self, config: TilesVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        out = config.out_features
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = VisionTransformer(config.tower, build, keep=config.deepstack_layers)
        self.in_norm = LayerNorm(config.tower.hidden_size, _EPS, build)
        self.coarse = _Path(config, config.square, build)
        self.fine = _Path(config, config.square // 2, build) if config.fine else None
        self.mid_norm = LayerNorm(out, _EPS, build)
        self.proj = Linear(out, out, build, bias=False)
        self.out_norm = LayerNorm(out, _EPS, build)

    def cost(self, item: MediaItem) -> int:
        return item.grid[0] * self.config.grid_side**2

    def capture_graphs(self, capture: Capture) -> None:
        size = self.config.image_size
        tile = blank((1, size, size, 3), (1, 1, 1), self.config.rows_per_tile(False))
        self.tower.capture_graphs(capture, rehearse=lambda: self.encode([tile]))

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        paths = [self._path(entry) for entry in media]
        counts = [entry.item.grid[0] for entry in media]
        patches = torch.cat(
            [
                patchify(
                    self.pixels.to_device(entry.pixels),
                    self.pixels.table,
                    patch=self.config.patch_size,
                    merge=1,
                    temporal=1,
                )
                for entry in media
            ]
        )
        length, tiles = self.config.grid_side**2, sum(counts)
        starts = torch.arange(0, (tiles + 1) * length, length, dtype=torch.int32, device=self.device)
        *kept, last = self.tower.states(patches, VisionSegments(starts, length))
        assert self.tower.post_norm is not None
        states = [self.in_norm(self.tower.post_norm(last)), *kept]
        features = [state.unflatten(0, (tiles, length)).split(counts) for state in states]
        found: dict[int, torch.Tensor] = {}
        for path in dict.fromkeys(paths):
            places = [place for place, each in enumerate(paths) if each is path]
            rows = self._rows(path, [torch.cat([state[place] for place in places]) for state in features])
            sizes = [media[place].item.num_tokens for place in places]
            found |= dict(zip(places, rows.split(sizes), strict=True))
        return [found[place] for place in range(len(media))]

    def _rows(self, path: _Path, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of tiles' features ``(tiles, patches, width)``: the last and those of each depth."""
        rows, deepstack = path(*features)
        rows = self.out_norm(self.proj(F.gelu(self.mid_norm(rows))))
        return torch.cat([rows, *deepstack], dim=-1).flatten(0, 1)

    def _path(self, entry: PreparedMedia) -> _Path:
        """The connector of an item.

        Raises:
            InvalidRequest: its pixels and rows don't fit its grid.
        """
        size, item = self.config.image_size, entry.item
        tiles = item.grid[0]
        if entry.pixels.shape == (tiles, size, size, 3) and entry.pixels.dtype == np.uint8:
            if item.num_tokens == tiles * self.config.rows_per_tile(False):
                return self.coarse
            if self.fine is not None and item.num_tokens == tiles * self.config.rows_per_tile(True):
                return self.fine
        raise unfit(entry)


class _Path(nn.Module):
    """Joins squares of ``factor`` by ``factor`` features to rows at fixed positions, and to what the first
    layers of the decoder get."""

    def __init__(self, config: TilesVisionConfig, factor: int, build: BuildContext) -> None:
        super().__init__()
        self.side, self.factor = config.grid_side, factor
        width, out = config.tower.hidden_size, config.out_features
        self.projection = Linear(width * factor**2, out, build, bias=False)
        self.positions: torch.Tensor
        positions = square_positions(self.side // factor, out).to(build.device, build.dtype)
        self.register_buffer("positions", positions, persistent=False)
        self.deepstack = nn.ModuleList(
            ShuffledMLPConnector(width, self.side, factor, MLPConfig("gelu"), out, build)
            for _ in config.deepstack_layers
        )

    def forward(self, last: torch.Tensor, *kept: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Rows ``(tiles, rows, out_features)``, and of each depth as many; of features
        ``(tiles, patches, width)``."""
        rows = self.projection(shuffled(last, self.side, self.factor)) + self.positions
        return rows, [merger(state) for merger, state in zip(self.deepstack, kept, strict=True)]


def square_positions(side: int, width: int) -> torch.Tensor:
    """Positions of the places of a square, row by row: float32 ``(side², width)``.

    The column's half, then the row's.
    """
    line = sine_positions(side, width // 2, torch.float64)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()
