"""The encoder of towers for square crops of one size, as CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from engine.graphs import Capture
from engine.kernels.patchify import patchify
from engine.layers.build import BuildContext
from engine.layers.linear import Linear
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.averaging import AveragingConnector
from engine.vision.bucketed_positions import bucketed_positions
from engine.vision.connector import MLPConnector
from engine.vision.crops_config import CropVisionConfig
from engine.vision.pixel_shuffle import GatedShuffleConnector, PixelShuffleConnector, ShuffledMLPConnector
from engine.vision.pixels import PixelInput, blank, unfit
from engine.vision.query_windows import WindowConnector
from engine.vision.segments import VisionSegments
from engine.vision.transformer import VisionTransformer
from engine.vision.visual_vocabulary import VocabularyConnector


class CropVisionEncoder(nn.Module):
    """Encodes uint8 crops ``(crops, size, size, 3)`` to rows ``(crops * rows_per_crop, out_features)``.

    Rows are in the order of the crops. The first number of an item's grid is the number of its crops.
    """

    def __init__(self, config: CropVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = VisionTransformer(config.tower, build)
        self.connector = _connector(config, build)
        side = config.grid_side
        self.positions = (
            bucketed_positions(side, side, side).to(build.device) if config.bucketed_positions else None
        )

    def cost(self, item: MediaItem) -> int:
        return item.grid[0] * self.config.patches_per_crop

    def capture_graphs(self, capture: Capture) -> None:
        size = self.config.image_size
        crop = blank((1, size, size, 3), (1,), self.config.rows_per_crop)
        self.tower.capture_graphs(capture, rehearse=lambda: self.encode([crop]))

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            if entry.item.num_tokens != entry.item.grid[0] * self.config.rows_per_crop:
                raise unfit(entry)
        rows = self.crop_rows(media).flatten(0, 1)
        return list(rows.split([entry.item.num_tokens for entry in media]))

    def crop_rows(self, media: Sequence[PreparedMedia]) -> torch.Tensor:
        """Rows ``(crops, rows_per_crop, out_features)`` of all crops of ``media``, in order.

        Raises:
            InvalidRequest: an item's pixels are not the crops that its grid announces.
        """
        for entry in media:
            self._check(entry)
        patches = torch.cat([self.patchify(self.pixels.to_device(entry.pixels)) for entry in media])
        return self.connector(self.features(patches, sum(entry.item.grid[0] for entry in media)))

    def patchify(self, crops: torch.Tensor) -> torch.Tensor:
        """Normalised flat patches ``(crops * patches, 3 * patch²)``, row by row, in the model's dtype."""
        return patchify(crops, self.pixels.table, patch=self.config.patch_size, merge=1, temporal=1)

    def features(self, patches: torch.Tensor, crops: int) -> torch.Tensor:
        """The tower's features ``(crops, rows_per_crop, hidden_size)``."""
        has_class = self.config.tower.class_token
        length = self.config.patches_per_crop + has_class
        starts = torch.arange(0, (crops + 1) * length, length, dtype=torch.int32, device=self.device)
        segments = VisionSegments(starts, length, positions=self.positions)
        features = self.tower(patches, segments).unflatten(0, (crops, length))
        return features[:, 1:] if self.config.drop_first else features

    def _check(self, entry: PreparedMedia) -> None:
        size = self.config.image_size
        if entry.pixels.shape != (entry.item.grid[0], size, size, 3) or entry.pixels.dtype != np.uint8:
            raise unfit(entry)


def _connector(config: CropVisionConfig, build: BuildContext) -> nn.Module:
    """The connector from features ``(crops, patches, width)`` to rows ``(crops, rows_per_crop, out)``."""
    width, out = config.tower.out_features, config.out_features
    if config.averaged is not None:
        eps = config.tower.norm_eps
        return AveragingConnector(width, config.grid_side, config.averaged, eps, out, build)
    if config.windows is not None:
        return WindowConnector(config.windows, config.grid_side, out // len(config.windows.order), build)
    if config.vocabulary is not None:
        factor = config.pixel_shuffle or 1
        return VocabularyConnector(width, config.grid_side, factor, config.vocabulary, out, build)
    if config.gated is not None:
        factor = config.pixel_shuffle or 1
        return GatedShuffleConnector(width, config.grid_side, factor, config.gated, out, build)
    if config.mlp is None:
        return Linear(width, out, build)
    if config.pixel_shuffle is not None and config.shuffled_mlp:
        return ShuffledMLPConnector(width, config.grid_side, config.pixel_shuffle, config.mlp, out, build)
    if config.pixel_shuffle is not None:
        return PixelShuffleConnector(width, config.grid_side, config.pixel_shuffle, out, build)
    return MLPConnector(width, config.mlp, out, build)
