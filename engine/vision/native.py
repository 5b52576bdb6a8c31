"""The encoder of towers that take images at their own resolution, as those of Qwen and Pixtral."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import nn

from engine.graphs import Capture
from engine.kernels.patchify import HEADER, describe_image, patchify, patchify_described
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.connector import (
    AdapterMerger,
    FramedMerger,
    GatedMerger,
    MLPConnector,
    PatchMerger,
    SquareMerger,
    TemporalMerger,
)
from engine.vision.graphs import MAX_TOKENS, ImageSource
from engine.vision.mlp_config import MLPConfig
from engine.vision.native_config import NativeVisionConfig
from engine.vision.native_grid import FramePlan, plan_frame
from engine.vision.pixels import PixelInput, blank, unfit
from engine.vision.segments import VisionSegments, segments_of
from engine.vision.transformer import VisionTransformer, make_norm


class NativeVisionEncoder(nn.Module):
    """Encodes uint8 images ``(H, W, 3)``, or ``(H, W, 4)`` with a byte that means nothing, and videos
    ``(frames, H, W, 3)``, with sides that are multiples of ``patch * merge``.

    Grids are ``(t, h, w)`` in patches. Rows are ``(config.rows(grid), out_features)``, with ``out_features``
    more numbers for each deepstack layer. Inside the tower the patches of a merged square are neighbours.
    """

    def __init__(self, config: NativeVisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.device = build.device
        self.pixels = PixelInput(config.normalisation, build)
        self.tower = VisionTransformer(config.tower, build, keep=config.deepstack_layers)
        width, group = config.tower.hidden_size, config.merge_size**2
        self.position_embedding = (
            build.parameter(config.position_side**2, width) if config.position_side is not None else None
        )
        merged = config.merged_features or config.out_features
        merger = partial(PatchMerger, width=width, group=group, out_features=merged, build=build)
        self.merger: nn.Module
        if config.squares is not None:
            assert config.mlp is not None and config.merge_size == 1
            self.merger = SquareMerger(width, config.squares, config.mlp, config.out_features, build)
        elif config.framed is not None:
            self.merger = FramedMerger(width, config.merge_size, config.framed, config.out_features, build)
        elif config.temporal is not None:
            self.merger = TemporalMerger(width, group, config.temporal, config.out_features, build)
        elif config.adapter is not None:
            self.merger = AdapterMerger(width, group, config.adapter, config.out_features, build)
        elif config.gated is not None:
            self.merger = GatedMerger(width, group, config.gated, config.out_features, build)
        elif config.mlp is not None:
            self.merger = MLPConnector(config.tower.out_features, config.mlp, config.out_features, build)
        else:
            norm = replace(
                config.tower,
                norm=config.merger_norm or config.tower.norm,
                norm_eps=config.merger_norm_eps or config.tower.norm_eps,
            )
            mlp, hidden = config.merger_mlp or MLPConfig(), config.merger_hidden
            self.merger = merger(make_norm(norm, width, build), mlp=mlp, hidden=hidden)
        self.deepstack = nn.ModuleList(
            merger(make_norm(config.tower, width * group, build), norm_after=True)
            for _ in config.deepstack_layers
        )
        self.projector = (
            None if config.merged_features is None else Linear(merged, config.out_features, build)
        )
        self._plan = lru_cache(maxsize=64)(lambda h, w: plan_frame(config, h, w, build.device))

    def cost(self, item: MediaItem) -> int:
        return item.grid[0] * item.grid[1] * item.grid[2]

    def capture_graphs(self, capture: Capture) -> None:
        window, merge = self.config.window, self.config.merge_size
        least = merge if self.config.squares is None else self.config.squares.side
        side = self.config.patch_size * least
        grid = 1, least, least
        image = blank((side, side, 3), grid, self.config.rows(grid))
        if self.config.tower.conv is not None:
            # Its frames' sizes would be those of the capture: passes are eager.
            self.encode([image])
            return
        self.tower.capture_graphs(
            capture,
            window_len=window and (window * merge) ** 2,
            positions=self.config.position_side is not None,
            image=self._image_source(image.pixels),
            # One image alone has kernels of its own.
            rehearse=lambda: [self.encode([image] * count) for count in (1, 2)],
        )

    @torch.inference_mode()
    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        for entry in media:
            self._check(entry)
        plans = [self._plan(*entry.item.grid[1:]) for entry in media]
        if len(media) == 1 and media[0].pixels.ndim == 3 and self.tower.takes_image(self.cost(media[0].item)):
            states = self.tower.image_states(media[0].pixels, plans[0].alone[0])
            return [self._merged(states, [media[0].item.grid])]
        patches = _joined(
            [
                self._reorder(self.patchify(self.pixels.to_device(entry.pixels)), entry, plan.order)
                for entry, plan in zip(media, plans, strict=True)
            ]
        )
        frames = [plan for entry, plan in zip(media, plans, strict=True) for _ in range(entry.item.grid[0])]
        grids = [entry.item.grid for entry in media]
        rows = self._rows(patches, frames, grids).split([entry.item.num_tokens for entry in media])
        return [
            self._reorder(part, entry, plan.inverse)
            for part, entry, plan in zip(rows, media, plans, strict=True)
        ]

    def patchify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised flat patches ``(t * h * w, 3 * temporal * patch²)`` of one item on the device, in the
        model's dtype."""
        return patchify(
            pixels,
            self.pixels.table,
            patch=self.config.patch_size,
            merge=self.config.merge_size,
            temporal=self.config.temporal_patch_size,
        )

    def _image_source(self, first: np.ndarray) -> ImageSource | None:
        """Return what makes patches of a single image within a graph, with ``first`` in its memory; None if
        something is done to patches before they are embedded, or after."""
        config = self.config
        if config.tower.features or config.window is not None or config.position_side is not None:
            return None

        def room(tokens: int) -> int:
            return HEADER + tokens * config.patch_size**2 * 4

        memory = torch.zeros(room(MAX_TOKENS), dtype=torch.uint8, device=self.device)
        described = torch.empty(HEADER + first.size, dtype=torch.uint8)
        describe_image(described.numpy(), first)
        memory[: len(described)] = described
        sides = {
            "patch": config.patch_size,
            "merge": config.merge_size,
            "temporal": config.temporal_patch_size,
        }
        return ImageSource(
            memory,
            lambda memory, rows: patchify_described(memory, self.pixels.table, rows, **sides),
            describe_image,
            lambda pixels: HEADER + pixels.size,
            room,
        )

    def _check(self, entry: PreparedMedia) -> None:
        t, h, w = entry.item.grid
        side, merge = self.config.patch_size, self.config.merge_size
        frames = () if entry.item.kind == "image" else (t * self.config.temporal_patch_size,)
        fits = (
            entry.pixels.shape[:-1] == (*frames, h * side, w * side)
            and entry.pixels.shape[-1] in ((3,) if frames else (3, 4))
            and entry.pixels.dtype == np.uint8
            and h % merge == w % merge == 0
            and entry.item.num_tokens == self.config.rows(entry.item.grid)
        )
        if not fits:
            raise unfit(entry)

    @staticmethod
    def _reorder(x: torch.Tensor, entry: PreparedMedia, order: torch.Tensor | None) -> torch.Tensor:
        """Reorder the merged squares of each frame; ``x`` has one row per square or per patch."""
        if order is None:
            return x
        return x.view(entry.item.grid[0], len(order), -1, x.shape[-1])[:, order].flatten(0, 2)

    def _rows(
        self, patches: torch.Tensor, frames: Sequence[FramePlan], grids: Sequence[tuple[int, ...]]
    ) -> torch.Tensor:
        """Rows of all frames. Patches attend within their frame, and within windows if there are any."""
        if self.config.tower.features:
            return self.merger(self.tower(patches, _segments(frames, self.device)[0]))
        segments, windows = frames[0].alone if len(frames) == 1 else _segments(frames, self.device)
        states = self.tower.states(patches, segments, windows=windows, positions=self._positions(frames))
        return self._merged(states, grids)

    def _merged(self, states: Sequence[torch.Tensor], grids: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Rows of the tower's outputs for items with ``grids``."""
        *kept, last = states
        # Kept outputs are in the order of the blocks, mergers in the order of the configuration.
        if self.config.squares is not None or self.config.framed is not None:
            return self.merger(last, [tuple(grid[1:]) for grid in grids for _ in range(grid[0])])
        if self.tower.post_norm is not None:
            last = self.tower.post_norm(last)
        if self.config.temporal is not None:
            return self.merger(last, grids)
        if self.projector is not None:
            return self.projector(self.merger(last))
        layers = self.config.deepstack_layers
        mergers = [self.deepstack[layers.index(layer)] for layer in sorted(layers)]
        appended = [merger(x) for merger, x in zip(mergers, kept, strict=True)]
        return _joined([self.merger(last), *appended], dim=1)

    def _positions(self, frames: Sequence[FramePlan]) -> torch.Tensor | None:
        """Learned positions ``(N, width)``, interpolated in float32."""
        if self.position_embedding is None:
            return None
        taps = torch.cat([f.taps for f in frames if f.taps is not None])
        weights = torch.cat([f.weights for f in frames if f.weights is not None])
        # Tap by tap: gathering all rows of every patch at once would take several times the memory.
        weighed = self.position_embedding[taps[:, 0]].float() * weights[:, :1]
        for tap in range(1, taps.shape[1]):
            weighed += self.position_embedding[taps[:, tap]].float() * weights[:, tap, None]
        return weighed.to(self.position_embedding.dtype)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        table = self.position_embedding
        if table is None:
            return []
        if not self.config.position_class:
            return [plain_slot(prefix + "position_embedding", table)]
        rows, width = table.shape
        patches = slice(1, rows + 1), slice(0, width)
        return [WeightSlot(prefix + "position_embedding", (rows + 1, width), [(patches, table)])]


def _segments(
    frames: Sequence[FramePlan], device: torch.device
) -> tuple[VisionSegments, VisionSegments | None]:
    """The segments of a batch of frames, and its windows if there are any."""
    cos, sin = (
        None if frames[0].angles is None else torch.cat([f.angles[part] for f in frames if f.angles])
        for part in (0, 1)
    )
    windows = [size for f in frames for size in f.windows]
    sizes = tuple(f.size for f in frames)
    segments = segments_of([f.patches for f in frames], device, cos=cos, sin=sin, frames=sizes)
    return segments, segments_of(windows, device, cos=cos, sin=sin) if windows else None


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """``torch.cat`` without the copy that it makes of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
