"""Gemma 4's encoder: images and frames of any size, averaged over squares of patches."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import nn

from engine.families.gemma4.config import PooledVisionConfig, SquareRowsConfig
from engine.graphs import Capture
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.layers.norm import UnitNorm
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.native_grid import axis_frequencies
from engine.vision.pixels import PixelInput, blank, check_pieces
from engine.vision.segments import segments_of
from engine.vision.transformer import VisionTransformer


class PooledVisionEncoder(nn.Module):
    """Encodes uint8 patches ``(N, patch², 3)`` of an image or of a video's frames to rows
    ``(N / side², out_features)``.

    The patches of a square are neighbours, and squares lie row by row. Grids are ``(frames, height, width)``
    in patches.
    """

    def __init__(self, config: PooledVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        width = config.tower.hidden_size
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = VisionTransformer(config.tower, build)
        self.position_embedding = build.parameter(2, config.num_positions, width)
        self.std_bias = build.parameter(width) if config.standardised else None
        self.std_scale = build.parameter(width) if config.standardised else None
        self.norm = UnitNorm(width, config.tower.norm_eps, build)
        self.projection = Linear(width, config.out_features, build, bias=False)

    def cost(self, item: MediaItem) -> int:
        frames, height, width = item.grid
        return frames * height * width

    def capture_graphs(self, capture: Capture) -> None:
        side, values = self.config.side, self.config.patch_size**2
        image = blank((side**2, values, 3), (1, side, side), 1)
        self.tower.capture_graphs(capture, rehearse=lambda: self.encode([image]))

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            check_frames(entry, self.config, self.config.num_positions)
        sizes = [entry.item.grid[1:] for entry in media for _ in range(entry.item.grid[0])]
        places = {size: self._places(*size) for size in dict.fromkeys(sizes)}
        columns, rows = torch.cat([places[size] for size in sizes], dim=1).to(self.device)
        angles = torch.cat([self._angles(columns), self._angles(rows)], dim=1)
        lengths = [height * width for height, width in sizes]
        segments = segments_of(lengths, self.device, cos=angles.cos(), sin=angles.sin())
        positions = self.position_embedding[0, columns] + self.position_embedding[1, rows]
        patches = torch.cat([self.pixels.last(self.pixels.to_device(entry.pixels)) for entry in media])
        features = self.tower.states(patches, segments, positions=positions)[-1]
        found = self.projection(self.norm(self._averages(features)))
        return list(found.split([entry.item.num_tokens for entry in media]))

    def _averages(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(N, width)`` to those of squares ``(N / side², width)``, rounded where Transformers
        rounds."""
        squares = features.view(-1, self.config.side**2, features.shape[-1])
        averages = squares.float().mean(1).to(features.dtype).float() * features.shape[-1] ** 0.5
        if self.std_bias is not None and self.std_scale is not None:
            averages = (averages - self.std_bias.float()) * self.std_scale.float()
        return averages.to(features.dtype)

    def _places(self, height: int, width: int) -> torch.Tensor:
        """Columns and rows of a frame's patches in their order, int64 ``(2, height * width)``."""
        side = self.config.side
        numbers = torch.arange(height * width).view(height // side, side, width // side, side)
        order = numbers.transpose(1, 2).flatten()
        return torch.stack([order % width, order // width])

    def _angles(self, places: torch.Tensor) -> torch.Tensor:
        """Angles ``(N, head_dim / 4)`` of a column or a row."""
        theta, head_dim = self.config.tower.rope_theta, self.config.tower.head_dim
        assert theta is not None
        return places.float()[:, None] * axis_frequencies(theta, head_dim, places.device)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        own = {
            "position_embedding": self.position_embedding,
            "std_bias": self.std_bias,
            "std_scale": self.std_scale,
        }
        return [plain_slot(prefix + name, each) for name, each in own.items() if each is not None]


def check_frames(entry: PreparedMedia, config: SquareRowsConfig, longest: int) -> None:
    """Check that an item's pixels are the uint8 patches of frames in whole squares.

    Args:
        longest: most patches along a side of a frame.

    Raises:
        InvalidRequest: they are not.
    """
    grid, side = entry.item.grid, config.side
    found = [grid[1:]] * grid[0] if len(grid) == 3 else []
    within = all(length <= longest for length in grid[1:])
    rows = sum(height * width for height, width in found) // side**2
    check_pieces(entry, found if within else [], (config.patch_size**2, 3), rows, side=side)
