"""GOT-OCR 2's encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from engine.families.got_ocr2.config import GotVisionConfig
from engine.graphs import Capture
from engine.kernels.patchify import patchify
from engine.layers.build import BuildContext
from engine.layers.linear import Linear
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.pixels import PixelInput, unfit
from engine.vision.sam import SamTower
from engine.vision.view_graphs import ViewGraphs

#: Crops of a captured pass: two keep the device busy for longer than the host launches their kernels.
_CAPTURED = 2


class GotVisionEncoder(nn.Module):
    """Encodes uint8 crops ``(crops, size, size, 3)`` to rows ``(crops * rows_per_crop, out_features)``.

    The first number of an item's grid is the number of its crops.
    """

    def __init__(self, config: GotVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = SamTower(config.tower, build)
        self.connector = Linear(config.out_features, config.out_features, build)
        side = config.tower.grid_side
        self.views = ViewGraphs(self.tower.stages(side), patches=side**2, pause=lambda: self.tower.pause())

    def cost(self, item: MediaItem) -> int:
        return item.grid[0] * self.config.tower.grid_side**2

    @torch.inference_mode()
    def capture_graphs(self, capture: Capture) -> None:
        self.views.capture(capture, _CAPTURED, 3 * self.config.tower.patch_size**2, self.pixels.table)

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        patches = [self.patchify(self.pixels.to_device(entry.pixels)) for entry in media]
        rows = self.connector(self.views(torch.cat(patches))).flatten(0, 1)
        return list(rows.split([entry.item.num_tokens for entry in media]))

    def patchify(self, crops: torch.Tensor) -> torch.Tensor:
        """Normalised flat patches ``(crops * patches, 3 * patch²)``, row by row, in the model's dtype."""
        return patchify(crops, self.pixels.table, patch=self.config.tower.patch_size, merge=1, temporal=1)

    def _check(self, entry: PreparedMedia) -> None:
        crops, size = entry.item.grid[0], self.config.image_size
        fits = (
            entry.pixels.shape == (crops, size, size, 3)
            and entry.pixels.dtype == np.uint8
            and entry.item.num_tokens == crops * self.config.rows_per_crop
        )
        if not fits:
            raise unfit(entry)
