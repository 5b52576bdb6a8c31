"""A gated convolution over the grid of patches, in place of a block's attention (LFM3-VL)."""

from __future__ import annotations

from collections.abc import Container
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels.fp8 import RoundedRows
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.vision.segments import VisionSegments
from engine.vision.transformer_config import VisionConfig


class GridConv(nn.Module):
    """Computes ``out(c * conv(b * u))``: ``b``, ``c`` and ``u`` are projections of the input, and ``conv``
    convolves each channel over the frame of patches that a segment is."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        assert config.conv is not None
        width, self.merge = config.hidden_size, config.conv.merge_size
        self.in_proj = Linear(width, 3 * width, build, bias=False, stored=build.tower)
        self.conv = build.parameter(width, 1, config.conv.size, config.conv.size)
        self.out_proj = Linear(width, width, build, bias=False, stored=build.tower)

    @property
    def projection(self) -> Linear:
        """The layer that gets the block's input."""
        return self.in_proj

    def forward(
        self, x: torch.Tensor | RoundedRows, segments: VisionSegments, index: torch.Tensor | None
    ) -> torch.Tensor:
        before, after, inner = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(after * self._convolved(before * inner, segments.frames))

    def _convolved(self, x: torch.Tensor, frames: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Convolve patches ``(N, width)``, of which those of a merged square are neighbours."""
        runs = [(frame, len(list(equal))) for frame, equal in groupby(frames)]
        parts = x.split([count * height * width for (height, width), count in runs])
        found = [self._run(part, *frame) for part, (frame, _) in zip(parts, runs, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _run(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Convolve frames of ``height`` by ``width`` patches."""
        merge, channels = self.merge, x.shape[-1]
        squares = x.view(-1, height // merge, width // merge, merge, merge, channels)
        grids = squares.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)
        grids = F.conv2d(grids, self.conv, padding=self.conv.shape[-1] // 2, groups=channels)
        squares = grids.view(-1, channels, height // merge, merge, width // merge, merge)
        return squares.permute(0, 2, 4, 3, 5, 1).reshape(-1, channels)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "conv.weight", self.conv)]
