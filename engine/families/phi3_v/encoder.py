"""Phi-3.5-vision's encoder: an overview and crops of an image; the crops' features are stitched."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.families.phi3_v.config import HDVisionConfig
from engine.graphs import Capture
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.connector import MLPConnector
from engine.vision.mlp_config import MLPConfig
from engine.vision.pixels import PixelInput, blank, unfit
from engine.vision.segments import VisionSegments
from engine.vision.transformer import VisionTransformer


class HDVisionEncoder(nn.Module):
    """Encodes uint8 canvases ``(down * size, across * size, 3)`` to rows ``(num_rows(grid), out_features)``.

    The order is: the stitched crops line by line, the separator, the overview line by line. A learned newline
    follows each line. The connector is applied to newlines and the separator too.
    """

    def __init__(self, config: HDVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device, self.dtype = build.device, build.dtype
        # Normalised in float32 in any model: the overview is interpolated from these numbers.
        exact = BuildContext(build.device, torch.float32, build.tp)
        self.pixels = PixelInput(config.normalisation, exact)
        self.tower = VisionTransformer(config.tower, build)
        width = 4 * config.tower.hidden_size
        self.sub_GN = build.parameter(1, 1, 1, width)
        self.glb_GN = build.parameter(1, 1, width)
        self.connector = MLPConnector(width, MLPConfig(), config.out_features, build)

    def cost(self, item: MediaItem) -> int:
        return (item.grid[0] * item.grid[1] + 1) * self.config.side**2

    def capture_graphs(self, capture: Capture) -> None:
        size, grid = self.config.image_size, (1, 1)
        image = blank((size, size, 3), grid, self.config.num_rows(grid))
        self.tower.capture_graphs(capture, rehearse=lambda: self.encode([image]))

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        crops = torch.cat([self.crops(self.pixels.to_device(entry.pixels)) for entry in media])
        features = self._features(crops)
        counts = [entry.item.grid[0] * entry.item.grid[1] + 1 for entry in media]
        joined = [
            self._joined(part, entry.item.grid)
            for part, entry in zip(features.split(counts), media, strict=True)
        ]
        rows = self.connector(torch.cat(joined))
        return list(rows.split([entry.item.num_tokens for entry in media]))

    def crops(self, canvas: torch.Tensor) -> torch.Tensor:
        """The overview and the crops row by row, normalised: ``(1 + n, 3, size, size)`` float32.

        The overview is the canvas interpolated bicubically after normalisation, without antialiasing.
        """
        size = self.config.image_size
        height, width = canvas.shape[:2]
        flat = self.pixels(canvas.reshape(-1, 3).T.reshape(1, 3, -1))
        image = flat.view(1, 3, height, width)
        overview = F.interpolate(image, size=(size, size), mode="bicubic")
        tiles = image[0].unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(1, 3, 0, 2, 4)
        return torch.cat([overview, tiles.flatten(0, 1)])

    def _features(self, crops: torch.Tensor) -> torch.Tensor:
        """The tower's features ``(crops, side, side, width)``, without the class token's."""
        patch, side = self.config.patch_size, self.config.side
        whole = side * patch
        cut = crops[:, :, :whole, :whole].unflatten(3, (side, patch)).unflatten(2, (side, patch))
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch * patch).to(self.dtype)
        length = side * side + 1
        starts = torch.arange(0, (len(crops) + 1) * length, length, dtype=torch.int32, device=self.device)
        features = self.tower(patches, VisionSegments(starts, length))
        return features.view(len(crops), length, -1)[:, 1:].unflatten(1, (side, side))

    def _joined(self, features: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """The connector's input ``(num_rows, 4 * width)`` from the features of an overview and its crops."""
        down, across = grid
        # down, across, side, side, width  →  down * side, across * side, width
        stitched = features[1:].unflatten(0, (down, across)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return torch.cat([self._lines(stitched), self.glb_GN[0], self._lines(features[0])])

    def _lines(self, image: torch.Tensor) -> torch.Tensor:
        """Join ``(h, w, width)`` two by two and add newlines: ``(h/2 * (w/2 + 1), 4 * width)``."""
        # h/2, 2, w/2, 2, width  →  h/2, w/2, 2, 2, width
        joined = image.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)
        return torch.cat([joined, self.sub_GN[0].expand(len(joined), 1, -1)], dim=1).flatten(0, 1)

    def _check(self, entry: PreparedMedia) -> None:
        size, grid = self.config.image_size, entry.item.grid
        fits = (
            len(grid) == 2
            and entry.pixels.dtype == np.uint8
            and entry.pixels.shape == (grid[0] * size, grid[1] * size, 3)
            and entry.item.num_tokens == self.config.num_rows(grid)
        )
        if not fits:
            raise unfit(entry)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + name, getattr(self, name)) for name in ("sub_GN", "glb_GN")]
