"""LFM2-VL's encoder: tiles of an image, and the whole of it."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import nn

from engine.families.lfm2_vl.config import TileVisionConfig, num_patches, pieces
from engine.graphs import Capture
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.norm import LayerNorm
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.connector import MLPConnector
from engine.vision.pixels import PixelInput, blank, check_pieces
from engine.vision.segments import segments_of
from engine.vision.transformer import VisionTransformer

_PROJECTOR_NORM_EPS = 1e-5


class TileVisionEncoder(nn.Module):
    """Encodes an image's uint8 patches ``(N, patch², 3)`` to rows ``(N / merge², out_features)``.

    Patches come piece by piece. In a piece the patches of a merged square are neighbours, and squares lie row
    by row. Grids are those of :func:`engine.families.lfm2_vl.config.pieces`.
    """

    def __init__(self, config: TileVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = VisionTransformer(config.tower, build)
        self.position_embedding = build.parameter(config.position_side**2, config.tower.hidden_size)
        width = config.tower.hidden_size * config.merge_size**2
        self.norm = LayerNorm(width, _PROJECTOR_NORM_EPS, build) if config.norm else None
        self.projector = MLPConnector(
            width, config.mlp, config.out_features, build, hidden=config.hidden_size
        )

    def cost(self, item: MediaItem) -> int:
        return num_patches(item.grid)

    def capture_graphs(self, capture: Capture) -> None:
        merge, values = self.config.merge_size, 3 * self.config.patch_size**2
        image = blank((merge**2, values // 3, 3), (0, 0, 0, merge, merge), 1)
        self.tower.capture_graphs(capture, rehearse=lambda: self.encode([image]))

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        sizes = [piece for entry in media for piece in pieces(entry.item.grid)]
        lengths = [height * width for height, width in sizes]
        segments = segments_of(lengths, self.device)
        patches = torch.cat([self.pixels.last(self.pixels.to_device(entry.pixels)) for entry in media])
        table = {size: self._positions(*size) for size in dict.fromkeys(sizes)}
        features = self.tower.states(patches, segments, positions=torch.cat([table[size] for size in sizes]))[
            -1
        ]
        if self.tower.post_norm is not None:
            features = self.tower.post_norm(features)
        squares = features.view(-1, self.config.merge_size**2 * features.shape[-1])
        rows = self.projector(squares if self.norm is None else self.norm(squares))
        return list(rows.split([entry.item.num_tokens for entry in media]))

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Learned positions ``(height * width, hidden)`` in the order of the patches, resized in float32."""
        side, merge = self.config.position_side, self.config.merge_size
        table = self.position_embedding.view(side, side, -1).float()
        down, along = (resizing(side, length, table.device) for length in (height, width))
        resized = torch.einsum("hr,wc,rcd->dhw", down, along, table)
        squares = resized.unflatten(1, (-1, merge)).unflatten(3, (-1, merge)).permute(1, 3, 2, 4, 0)
        return squares.reshape(height * width, -1).to(self.position_embedding.dtype)

    def _check(self, entry: PreparedMedia) -> None:
        grid, merge = entry.item.grid, self.config.merge_size
        found, rows = (pieces(grid), num_patches(grid) // merge**2) if len(grid) == 5 else ([], 0)
        check_pieces(entry, found, (self.config.patch_size**2, 3), rows, side=merge)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "position_embedding", self.position_embedding)]


def resizing(side: int, length: int, device: torch.device) -> torch.Tensor:
    """Weights ``(length, side)`` of antialiased linear interpolation from ``side`` places to ``length``.

    They are those of ``torch.nn.functional.interpolate``, which on a CPU resizes wrongly to one column.
    """
    places = (torch.arange(length, device=device) + 0.5) * (side / length) - 0.5
    distances = (torch.arange(side, device=device) - places[:, None]).abs()
    weights = (1 - distances / max(side / length, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)
