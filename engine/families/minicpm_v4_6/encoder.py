"""MiniCPM-V 4.6's encoder: an overview and slices of each image, merged inside the tower and behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from engine.families.minicpm_v4_6.config import MergedVisionConfig, all_pieces
from engine.families.minicpm_v4_6.squares import nested_order
from engine.graphs import Capture
from engine.layers.build import BuildContext
from engine.layers.mlp import MLP
from engine.layers.norm import LayerNorm
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.bucketed_positions import bucketed_positions
from engine.vision.connector import PatchMerger
from engine.vision.pixels import PixelInput, blank, check_pieces
from engine.vision.segments import VisionSegments, segments_of
from engine.vision.transformer import VisionAttention, VisionTransformer, make_norm
from engine.vision.transformer_config import VisionConfig

_WINDOW = 4  # patches
_MERGER_NORM_EPS = 1e-6


class WindowMerger(nn.Module):
    """Attention within each window of four consecutive patches, which then become one.

    Input ``(N, width)``, output ``(N / 4, width)``: an MLP of the four joined, plus their mean.
    """

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        # It stands between blocks of the tower, and keeps its matrices as they are.
        build = replace(build, tower=None)
        width = config.hidden_size
        self.norm1 = make_norm(config, width, build)
        self.attn = VisionAttention(config, build)
        self.norm2 = make_norm(config, width * _WINDOW, build)
        inner = config.intermediate_size * _WINDOW
        self.mlp = MLP(width * _WINDOW, inner, "gelu_pytorch_tanh", build, out=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        starts = torch.arange(0, len(x) + 1, _WINDOW, dtype=torch.int32, device=x.device)
        x = x + self.attn(self.norm1(x), VisionSegments(starts, _WINDOW), None)
        windows = x.view(-1, _WINDOW, x.shape[-1])
        return self.mlp(self.norm2(windows.flatten(1))) + windows.mean(dim=1)


class MergedVisionEncoder(nn.Module):
    """Encodes an image's or a video's uint8 patches ``(N, 3, patch²)`` to rows ``(N / side², out_features)``.

    Patches come piece by piece, in each in the order of :func:`nested_order`. Grids are those of
    :func:`engine.families.minicpm_v4_6.config.all_pieces`.
    """

    def __init__(self, config: MergedVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = VisionTransformer(config.tower, build)
        self.window_merger = None if config.merged_after is None else WindowMerger(config.tower, build)
        width = config.tower.hidden_size
        norm = LayerNorm(width * _WINDOW, _MERGER_NORM_EPS, build)
        self.merger = PatchMerger(norm, width, _WINDOW, config.out_features, build, norm_after=True)
        self._positions = lru_cache(maxsize=256)(self._plan)

    def _plan(self, height: int, width: int) -> torch.Tensor:
        positions = bucketed_positions(height, width, self.config.position_side, fractions="quotients")
        order = torch.from_numpy(nested_order(height, width, self.config.side))
        return positions[order].to(self.device)

    def cost(self, item: MediaItem) -> int:
        return _patches(item.grid)

    def capture_graphs(self, capture: Capture) -> None:
        """Compile the kernels; the tower's halves run eagerly."""
        side = self.config.side
        self.encode([blank((side**2, 3, self.config.patch_size**2), (side, side, 0, 0, 0, 0), 1)])

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        sizes = [piece for entry in media for piece in all_pieces(entry.item.grid)]
        lengths = [height * width for height, width in sizes]
        positions = torch.cat([self._positions(*size) for size in sizes])
        segments = segments_of(lengths, self.device, positions=positions)
        patches = torch.cat([self.pixels(self.pixels.to_device(entry.pixels)) for entry in media])
        x, after = self.tower.begin(patches, segments), self.config.merged_after
        if self.window_merger is not None and after is not None:
            x = self.window_merger(self.tower.run_blocks(x, segments, 0, after + 1))
            shorter = segments_of([length // _WINDOW for length in lengths], self.device)
            x = self.tower.run_blocks(x, shorter, after + 1, self.config.tower.num_layers)
        else:
            x = self.tower.run_blocks(x, segments, 0, self.config.tower.num_layers)
        assert self.tower.post_norm is not None
        rows = self.merger(self.tower.post_norm(x))
        return list(rows.split([entry.item.num_tokens for entry in media]))

    def _check(self, entry: PreparedMedia) -> None:
        grid, side = entry.item.grid, self.config.side
        whole = len(grid) == (7 if entry.item.kind == "video" else 6)
        found, rows = (all_pieces(grid), _patches(grid) // side**2) if whole else ([], 0)
        check_pieces(entry, found, (3, self.config.patch_size**2), rows, side=side)


def _patches(grid: tuple[int, ...]) -> int:
    return sum(height * width for height, width in all_pieces(grid))
