"""Gemma 4 unified's encoder: squares of pixels are projected to rows, and nothing attends."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import nn

from engine.families.gemma4.encoder import check_frames
from engine.families.gemma4_unified.config import ProjectedVisionConfig
from engine.graphs import Capture
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm, UnitNorm
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.pixels import PixelInput, blank

#: Of torch's layer norm, whose default Transformers leaves as it is.
_EPS = 1e-5


class ProjectedVisionEncoder(nn.Module):
    """Encodes uint8 patches ``(N, patch², 3)`` of an image or of a video's frames to rows
    ``(N / side², out_features)``.

    The patches of a square are neighbours, and squares lie row by row. Grids are ``(frames, height, width)``
    in patches.
    """

    def __init__(self, config: ProjectedVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        width, values = config.width, 3 * (config.patch_size * config.side) ** 2
        self.pixels = PixelInput(config.normalisation, build)
        self.patch_norm = LayerNorm(values, _EPS, build)
        self.dense = Linear(values, width, build, bias=True)
        self.dense_norm = LayerNorm(width, _EPS, build)
        self.position_embedding = build.parameter(config.num_positions, 2, width)
        self.position_norm = LayerNorm(width, _EPS, build)
        self.norm = UnitNorm(width, config.norm_eps, build)
        self.projection = Linear(width, config.out_features, build, bias=False)

    def cost(self, item: MediaItem) -> int:
        return item.num_tokens

    def capture_graphs(self, capture: Capture) -> None:
        """Compile kernels. A dozen launches need no graph."""
        side, values = self.config.side, self.config.patch_size**2
        self.encode([blank((side**2, values, 3), (1, side, side), 1)])

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            check_frames(entry, self.config, self.config.num_positions * self.config.side)
        squares = torch.cat([self._squares(self.pixels.to_device(entry.pixels)) for entry in media])
        columns, rows = torch.cat([self._places(entry.item) for entry in media], dim=1).to(self.device)
        features = self.dense_norm(self.dense(self.patch_norm(self.pixels.last(squares))))
        positions = self.position_embedding[columns, 0] + self.position_embedding[rows, 1]
        found = self.projection(self.norm(self.position_norm(features + positions)))
        return list(found.split([entry.item.num_tokens for entry in media]))

    def _squares(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches ``(N, patch², 3)`` as squares ``(N / side², (side * patch)², 3)``, pixels row by row."""
        side, patch = self.config.side, self.config.patch_size
        apart = patches.view(-1, side, side, patch, patch, 3)
        return apart.transpose(2, 3).reshape(-1, (side * patch) ** 2, 3)

    def _places(self, item: MediaItem) -> torch.Tensor:
        """Columns and rows of an item's squares, int64 ``(2, rows)``."""
        frames, height, width = item.grid
        down, along = height // self.config.side, width // self.config.side
        numbers = torch.arange(down * along).repeat(frames)
        return torch.stack([numbers % along, numbers // along])

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "position_embedding", self.position_embedding)]
