"""The encoder of towers that take pictures in their own resolution, as Qwen's: pixels in, merged rows out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from engine.errors import InvalidRequest
from engine.inputs.prompt import MediaItem, PreparedMedia
from engine.layers.build import BuildContext
from engine.layers.connector import PatchMerger
from engine.layers.native_vision_config import NativeVisionConfig
from engine.layers.pixels import Pixels
from engine.layers.vision import VisionSegments, VisionTransformer, make_norm


class NativeVisionEncoder(nn.Module):
    """uint8 pictures ``(H, W, 3)`` or videos ``(frames, H, W, 3)``, sides multiples of ``patch * merge``, to
    rows ``(t * h * w / merge², out_features)`` of their grids ``(t, h, w)``.

    Patches go in the order of the merged squares, so that a square's patches are neighbours.
    """

    def __init__(self, config: NativeVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        self.pixels = Pixels(config.mean, config.std, config.scale, build)
        self.tower = VisionTransformer(config.tower, build)
        self.merger = PatchMerger(
            make_norm(config.tower, config.tower.hidden_size, build),
            config.tower.hidden_size,
            config.merge_size**2,
            config.out_features,
            build,
        )
        self._rope = lru_cache(maxsize=64)(self._rope_of_grid)

    def cost(self, item: MediaItem) -> int:
        return item.grid[0] * item.grid[1] * item.grid[2]

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        patches = torch.cat([self.patchify(self.pixels.upload(entry.pixels)) for entry in media])
        grids = [entry.item.grid for entry in media]
        rows = self.merger(self.tower(patches, self._segments(grids)))
        return list(rows.split([entry.item.num_tokens for entry in media]))

    def patchify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised flat patches ``(t * h * w, 3 * temporal * patch²)`` of one item on the device, in the
        model's dtype."""
        patch, merge, temporal = (
            self.config.patch_size,
            self.config.merge_size,
            self.config.temporal_patch_size,
        )
        frames = pixels if pixels.dim() == 4 else pixels.expand(temporal, *pixels.shape)
        frames = frames.unflatten(0, (-1, temporal))
        frames = frames.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        # t, T, H, m, p, W, m, p, C  →  t, H, W, m, m, C, T, p, p
        flat = frames.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3, temporal * patch * patch)
        return self.pixels(flat)

    def _check(self, entry: PreparedMedia) -> None:
        t, h, w = entry.item.grid
        side, merge = self.config.patch_size, self.config.merge_size
        frames = () if entry.item.kind == "image" else (t * self.config.temporal_patch_size,)
        fits = (
            entry.pixels.shape == (*frames, h * side, w * side, 3)
            and entry.pixels.dtype == np.uint8
            and h % merge == w % merge == 0
            and entry.item.num_tokens == t * h * w // merge**2
        )
        if not fits:
            raise InvalidRequest(
                f"{entry.pixels.dtype} pixels of shape {entry.pixels.shape} and {entry.item.num_tokens} rows "
                f"do not fit grid {entry.item.grid}",
                param="image",
            )

    def _segments(self, grids: Sequence[tuple[int, ...]]) -> VisionSegments:
        """Each frame of patches attends within itself."""
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        tables = [self._rope(*grid) for grid in grids]
        return VisionSegments(
            cu_seqlens.to(self.device, non_blocking=True),
            max(lengths),
            torch.cat([cos for cos, _ in tables]),
            torch.cat([sin for _, sin in tables]),
        )

    def _rope_of_grid(self, t: int, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``(t * h * w, head_dim / 2)``: angles of the row, then of the column."""
        theta, half = self.config.tower.rope_theta, self.config.tower.head_dim // 2
        assert theta is not None
        frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
        rows, columns = (axis.flatten() for axis in self._coordinates(h, w))
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1).repeat(t, 1)
        return angles.cos().to(self.device), angles.sin().to(self.device)

    def _coordinates(self, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each patch of a frame, in the order of :meth:`patchify`."""
        merge = self.config.merge_size
        grid = torch.arange(h * w).view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
        return (grid // w).float(), (grid % w).float()
