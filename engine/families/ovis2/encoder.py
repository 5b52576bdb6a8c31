"""Ovis2's encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from engine.families.ovis2.layout import num_indicators, parts
from engine.graphs import Capture
from engine.layers.build import BuildContext
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.crops import CropVisionEncoder
from engine.vision.crops_config import CropVisionConfig
from engine.vision.pixels import unfit
from engine.vision.visual_vocabulary import VocabularyConnector


class Ovis2VisionEncoder(nn.Module):
    """Encodes uint8 crops ``(crops, size, size, 3)`` to rows of ``out_features``, with the rows that mark the
    parts of an image among those of its crops. Grids are those of :func:`engine.families.ovis2.layout.parts`.
    """

    def __init__(self, config: CropVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.crops = CropVisionEncoder(config, build)

    def cost(self, item: MediaItem) -> int:
        return self.crops.cost(item)

    def capture_graphs(self, capture: Capture) -> None:
        self.crops.capture_graphs(capture)

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            crops, rows, columns = grid = entry.item.grid
            wanted = crops * self.config.rows_per_crop + num_indicators(grid)
            if crops != 1 + rows * columns or entry.item.num_tokens != wanted:
                raise unfit(entry)
        features = self.crops.crop_rows(media).split([entry.item.grid[0] for entry in media])
        return [self._rows(entry.item.grid, of_item) for entry, of_item in zip(media, features, strict=True)]

    def _rows(self, grid: tuple[int, ...], features: torch.Tensor) -> torch.Tensor:
        """Rows of an item from those of its crops, ``(crops, rows_per_crop, out_features)``."""
        assert isinstance(self.crops.connector, VocabularyConnector)
        words, crops = self.crops.connector.indicators, iter(features)
        return torch.cat([next(crops) if part is None else words[part : part + 1] for part in parts(grid)])
