"""MiniCPM-V's encoder: an overview and slices of each image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

from engine.families.minicpm_v.config import SliceVisionConfig, pieces
from engine.graphs import Capture
from engine.layers.build import BuildContext
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.bucketed_positions import bucketed_positions
from engine.vision.pixels import PixelInput, blank, check_pieces
from engine.vision.resampler import Resampler
from engine.vision.segments import segments_of
from engine.vision.transformer import VisionTransformer


class SliceVisionEncoder(nn.Module):
    """Encodes an image's uint8 patches ``(N, 3, patch²)`` to rows ``(pieces * num_queries, out_features)``.

    Patches come piece by piece, and row by row in each piece. Grids are those of
    :func:`engine.families.minicpm_v.config.pieces`.
    """

    def __init__(self, config: SliceVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = VisionTransformer(config.tower, build)
        self.resampler = Resampler(
            config.num_queries, config.tower.hidden_size, config.out_features, config.num_heads, build
        )
        self._positions = lru_cache(maxsize=256)(
            lambda height, width: bucketed_positions(height, width, config.table_side, fractions="range").to(
                build.device
            )
        )

    def cost(self, item: MediaItem) -> int:
        return _patches(item.grid)

    def capture_graphs(self, capture: Capture) -> None:
        image = blank((1, 3, self.config.patch_size**2), (1, 1, 0, 0, 0, 0), self.config.num_queries)
        self.tower.capture_graphs(capture, rehearse=lambda: self.encode([image]))

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        sizes = [piece for entry in media for piece in pieces(entry.item.grid)]
        lengths = [height * width for height, width in sizes]
        positions = torch.cat([self._positions(*size) for size in sizes])
        segments = segments_of(lengths, self.device, positions=positions)
        patches = torch.cat([self.pixels(self.pixels.to_device(entry.pixels)) for entry in media])
        rows = self.resampler(self.tower(patches, segments), sizes).flatten(0, 1)
        return list(rows.split([entry.item.num_tokens for entry in media]))

    def _check(self, entry: PreparedMedia) -> None:
        found = pieces(entry.item.grid) if len(entry.item.grid) == 6 else []
        check_pieces(entry, found, (3, self.config.patch_size**2), len(found) * self.config.num_queries)


def _patches(grid: tuple[int, ...]) -> int:
    return sum(height * width for height, width in pieces(grid))
