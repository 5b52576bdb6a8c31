"""Molmo 2's encoder: crops of an image, or frames, and windows of patches pooled by attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from engine.families.molmo2.config import AdapterConfig, MolmoVisionConfig
from engine.graphs import Capture
from engine.kernels.activation import ACTIVATIONS
from engine.layers.build import BuildContext
from engine.layers.linear import Linear
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.pixels import PixelInput, blank, check_pieces
from engine.vision.segments import segments_of
from engine.vision.transformer import VisionTransformer


class MolmoVisionEncoder(nn.Module):
    """Encodes the uint8 patches ``(N, patch², 3)`` of an image or video to rows ``(config.rows(grid),
    out_features)``.

    Patches come crop by crop, the whole image first, or frame by frame, and line by line in each.
    """

    def __init__(self, config: MolmoVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = VisionTransformer(config.tower, build)
        self.adapter = Adapter(config.tower.out_features, config.adapter, config.out_features, build)
        self._windows = lru_cache(maxsize=64)(
            lambda grid: torch.from_numpy(config.windows(grid)).to(build.device)
        )

    def cost(self, item: MediaItem) -> int:
        return self.config.num_patches(item.grid)

    def capture_graphs(self, capture: Capture) -> None:
        grid = 1, 1
        shape = self.config.num_patches(grid), self.config.patch_size**2, 3
        image = blank(shape, grid, self.config.rows(grid))
        self.tower.capture_graphs(capture, positions=False, rehearse=lambda: self.encode([image]))

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        counts = [self.config.num_patches(entry.item.grid) for entry in media]
        patches = torch.cat([self.pixels.last(self.pixels.to_device(entry.pixels)) for entry in media])
        crop = self.config.side**2
        features = self.tower(patches, segments_of([crop] * (len(patches) // crop), self.device))
        return [
            self.adapter(part, self._windows(entry.item.grid))
            for part, entry in zip(features.split(counts), media, strict=True)
        ]

    def _check(self, entry: PreparedMedia) -> None:
        grid, side = entry.item.grid, self.config.side
        known = len(grid) == (1 if entry.item.kind == "video" else 2) and min(grid) > 0
        pieces = [(side, side)] * self.config.squares(grid) if known else []
        rows = self.config.rows(grid) if known else 0
        check_pieces(entry, pieces, (self.config.patch_size**2, 3), rows)


class Adapter(nn.Module):
    """Pools windows of features by attention of their mean to them, and projects the result by a gated MLP.

    Args:
        width: of a feature.
    """

    def __init__(self, width: int, config: AdapterConfig, out_features: int, build: BuildContext) -> None:
        super().__init__()
        hidden, self.heads = config.hidden_size, config.num_heads
        self.activation = ACTIVATIONS[config.activation]
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(width, hidden, build, bias=config.bias) for _ in range(3)
        )
        self.o_proj = Linear(hidden, hidden, build, bias=config.bias)
        self.gate_proj = Linear(hidden, config.intermediate_size, build, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, config.intermediate_size, build, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, out_features, build, bias=False)

    def forward(self, features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Rows ``(R, out_features)`` of ``features (N, width)``.

        Args:
            windows: int64 ``(R, k)``, the features of each window; -1 stands for none.
        """
        known = windows >= 0
        pooled = features[windows.clamp(min=0)] * known[..., None].to(features.dtype)
        mean = pooled.sum(1, keepdim=True) / known.sum(1)[:, None, None].to(features.dtype)
        query, key, value = self.q_proj(mean), self.k_proj(pooled), self.v_proj(pooled)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=known[:, None, None])
        out = self.o_proj(attended.transpose(1, 2).flatten(1))
        return self.down_proj(self.activation(self.gate_proj(out)) * self.up_proj(out))
