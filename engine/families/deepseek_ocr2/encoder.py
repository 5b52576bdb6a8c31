"""DeepSeek-OCR 2's encoder: a SAM tower, and learned queries that read its features one after the other."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.families.deepseek_ocr2.config import TILE_QUERIES, WHOLE_QUERIES, DeepseekVisionConfig
from engine.graphs import Capture
from engine.kernels.patchify import patchify
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.pixels import PixelInput, unfit
from engine.vision.sam import SamTower
from engine.vision.segments import VisionSegments
from engine.vision.transformer import VisionAttention, VisionBlock
from engine.vision.transformer_config import VisionConfig
from engine.vision.view_graphs import Stage, ViewGraphs

#: Squares of a captured pass: all tiles of an image, and one or two whole images.
_TILES, _WHOLES = 6, 2
#: Blocks of the second encoder in a stage.
_BLOCKS = 12


class QueryAttention(VisionAttention):
    """Attention of features and the queries behind them: to all features, and of queries to earlier ones."""

    def attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VisionSegments
    ) -> torch.Tensor:
        length = segments.max_len
        places = torch.arange(length, device=q.device)
        seen = (places <= places[:, None]) | (places < length // 2)
        queries, keys, values = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, seen)
        return out.transpose(1, 2).flatten(0, 1)


class QueryEncoder(nn.Module):
    """Computes what learned queries read, ``(squares, queries, width)``, from as many features."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        width = config.hidden_size
        self.tile_queries = build.parameter(TILE_QUERIES, width)
        self.whole_queries = build.parameter(WHOLE_QUERIES, width)
        self.blocks = nn.ModuleList(
            VisionBlock(config, build, QueryAttention) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(width, config.norm_eps, build)
        assert config.rope_theta is not None
        exponents = torch.arange(0, config.head_dim, 2, device=build.device).float() / config.head_dim
        places = torch.arange(2 * WHOLE_QUERIES, device=build.device).float()
        angles = places[:, None] * (1 / config.rope_theta**exponents)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def stages(self, features: int) -> list[Stage]:
        """The parts of a pass over squares with so many features: the first takes these, the last returns
        what queries read of them."""
        count = len(self.blocks)
        firsts = range(0, count, _BLOCKS)
        return [partial(self._part, first, min(first + _BLOCKS, count), 2 * features) for first in firsts]

    def _part(self, first: int, end: int, length: int, given: Any) -> Any:
        """Run the blocks from ``first`` to before ``end`` on ``length`` features and queries of a square."""
        if first:
            x, residual = given
        else:
            queries = self.tile_queries if length == 2 * TILE_QUERIES else self.whole_queries
            x = torch.cat([given, queries.expand(len(given), -1, -1)], dim=1).flatten(0, 1)
            residual = None
        index = torch.arange(length, device=x.device).repeat(len(x) // length)
        bounds = torch.arange(0, len(x) + 1, length, dtype=torch.int32, device=x.device)
        segments = VisionSegments(bounds, length, self.cos, self.sin)
        for block in self.blocks[first:end]:
            x, residual = block(x, residual, segments, index)
        if end < len(self.blocks):
            return x, residual
        return self.norm.add(x, residual)[0].unflatten(0, (-1, length))[:, length // 2 :]

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + name, getattr(self, name)) for name in ("tile_queries", "whole_queries")]


class DeepseekVisionEncoder(nn.Module):
    """Encodes the uint8 bytes of an image's squares, its tiles and then the whole, to ``config.rows`` rows.

    Grids are ``(squares, rows, columns)``, 1, 0 and 0 for an image without tiles. Such an image may have the
    size of a tile. Rows are those of the squares in order, and a separator.
    """

    def __init__(self, config: DeepseekVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = SamTower(config.tower, build)
        self.encoder = QueryEncoder(config.encoder, build)
        self.projector = Linear(config.encoder.hidden_size, config.out_features, build)
        self.separator = build.parameter(config.out_features)
        self.tiles, self.wholes = (self._views(side) for side in (config.tile_side, config.whole_side))

    def _views(self, side: int) -> ViewGraphs:
        across = side // self.config.tower.patch_size
        rows = self.config.tower.rows(across)
        return ViewGraphs(
            [*self.tower.stages(across), *self.encoder.stages(rows)],
            patches=across**2,
            pause=lambda: self.tower.pause(),
        )

    def cost(self, item: MediaItem) -> int:
        tiles, whole = self._squares(item)
        config = self.config
        return tiles * config.patches(config.tile_side) + whole * config.patches(config.whole_side)

    @torch.inference_mode()
    def capture_graphs(self, capture: Capture) -> None:
        patch_dim, like = 3 * self.config.tower.patch_size**2, self.pixels.table
        self.tiles.capture(capture, _TILES, patch_dim, like)
        self.wholes.capture(capture, _WHOLES, patch_dim, like)

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        counts = [self._squares(entry.item) for entry in media]
        patches = [self.patchify(self.pixels.to_device(entry.pixels)) for entry in media]
        ends = [tiles * self.config.patches(self.config.tile_side) for tiles, _ in counts]
        of_tiles = [each[:end] for each, end in zip(patches, ends, strict=True)]
        of_wholes = [each[end:] for each, end in zip(patches, ends, strict=True)]
        tiles = self._rows(self.tiles, of_tiles, [count for count, _ in counts], TILE_QUERIES)
        wholes = self._rows(self.wholes, of_wholes, [count for _, count in counts], WHOLE_QUERIES)
        return [torch.cat([*parts, self.separator[None]]) for parts in zip(tiles, wholes, strict=True)]

    def _rows(
        self, views: ViewGraphs, patches: Sequence[torch.Tensor], counts: Sequence[int], queries: int
    ) -> list[torch.Tensor]:
        """The rows ``(count * queries, out_features)`` of each item's squares of one size."""
        if not any(counts):
            return [self.separator.new_empty(0, self.config.out_features) for _ in counts]
        rows = self.projector(views(torch.cat(list(patches)))).flatten(0, 1)
        return list(rows.split([count * queries for count in counts]))

    def patchify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised flat patches ``(patches, 3 * patch²)`` of the bytes of an image's squares, in order, in
        the model's dtype."""
        sides = self.config.tile_side, self.config.whole_side
        tile, whole = (3 * side**2 for side in sides)
        end = len(pixels) - (whole if len(pixels) >= whole else 0)
        parts = [
            patchify(
                part.view(-1, side, side, 3),
                self.pixels.table,
                patch=self.config.tower.patch_size,
                merge=1,
                temporal=1,
            )
            for part, side in zip((pixels[:end], pixels[end:]), sides, strict=True)
            if len(part)
        ]
        assert end % tile == 0
        return torch.cat(parts)

    def _squares(self, item: MediaItem) -> tuple[int, int]:
        """The number of squares of the size of a tile, and of larger ones."""
        if item.num_tokens == self.config.rows(0, small=True):
            return 1, 0
        return item.grid[0] - 1, 1

    def _check(self, entry: PreparedMedia) -> None:
        config, item = self.config, entry.item
        squares, rows, columns = item.grid
        tiles, whole = self._squares(item)
        fits = (
            squares == 1 + rows * columns
            and item.num_tokens == config.rows(squares - 1, small=not whole)
            and entry.pixels.shape == (3 * (tiles * config.tile_side**2 + whole * config.whole_side**2),)
            and entry.pixels.dtype == np.uint8
        )
        if not fits:
            raise unfit(entry)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "separator", self.separator)]
