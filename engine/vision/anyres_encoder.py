"""The encoder of images as a whole and in tiles without their padding, and of videos (LLaVA-NeXT,
LLaVA-OneVision)."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from engine.graphs import Capture
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.anyres import AnyresConfig, tiled_rows
from engine.vision.crops import CropVisionEncoder
from engine.vision.pixels import unfit


class AnyresVisionEncoder(nn.Module):
    """Encodes uint8 crops ``(crops, size, size, 3)`` to rows of ``out_features``, by the item's grid:

    - ``(1, 0, 0)``, an image in one crop: its features and the newline row;
    - ``(1 + h * w, h, w)``, an image as a whole and in tiles: the features of the whole, then those of the
      tiles joined to one image without its padding, each line followed by the newline row;
    - ``(frames, 0, 0)``, a video: the features of each frame, shrunk to half the height and width, and one
      newline row at the end.
    """

    def __init__(self, config: AnyresConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.crops = CropVisionEncoder(config.crops, build)
        self.newline = build.parameter(config.crops.out_features // config.parts)

    def cost(self, item: MediaItem) -> int:
        return self.crops.cost(item)

    def capture_graphs(self, capture: Capture) -> None:
        self.crops.capture_graphs(capture)

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            if (
                entry.item.kind == "image"
                and entry.item.grid[0] != 1 + entry.item.grid[1] * entry.item.grid[2]
            ):
                raise unfit(entry)
        features = self.crops.crop_rows(media).split([entry.item.grid[0] for entry in media])
        return [self._rows(entry.item, part) for entry, part in zip(media, features, strict=True)]

    def _rows(self, item: MediaItem, features: torch.Tensor) -> torch.Tensor:
        """Rows of one item from ``(crops, rows_per_crop, out_features)``."""
        if item.kind == "video":
            side = -(-self.config.side // 2)
            halved = _resized(self._as_grids(features), side, side)
            return torch.cat([halved.flatten(0, 2), self._line_end()])
        if len(features) == 1:
            return torch.cat([features[0], self._line_end()])
        return torch.cat([features[0], self._tiles(item, self._as_grids(features[1:]))])

    def _line_end(self) -> torch.Tensor:
        """The newline row ``(1, out_features)``."""
        return self.newline.repeat(1, self.config.parts)

    def _as_grids(self, features: torch.Tensor) -> torch.Tensor:
        return features.unflatten(1, (self.config.side, -1))

    def _tiles(self, item: MediaItem, tiles: torch.Tensor) -> torch.Tensor:
        """Rows of ``(tiles, side, side, out_features)`` joined to one image, line by line."""
        _, down, along = item.grid
        image = tiles.unflatten(0, (down, along)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        part = tiled_rows(item.size, (down, along), self.config.side, self.config.max_tiles)
        image = image[part.top : part.top + part.height, part.left : part.left + part.width]
        if (part.rows, part.columns) != (part.height, part.width):
            image = _resized(image[None], part.rows, part.columns)[0]
        ends = self._line_end().expand(part.rows, 1, -1)
        return torch.cat([image, ends], dim=1).flatten(0, 1)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "newline", self.newline)]


def _resized(grids: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``(N, height, width, features)`` interpolated bilinearly to ``(N, rows, columns, features)``."""
    resized = F.interpolate(grids.permute(0, 3, 1, 2), size=(rows, columns), mode="bilinear")
    return resized.permute(0, 2, 3, 1)
