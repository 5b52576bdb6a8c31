"""The configuration of MiniCPM-V's encoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class SliceVisionConfig:
    """A tower with bucketed positions, and a resampler.

    Attributes:
        tower: the transformer; its learned positions are a square table.
        patch_size: side of a patch in pixels.
        num_queries: rows per piece; a piece is the overview or a slice.
        num_heads: attention heads of the resampler.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    patch_size: int
    num_queries: int
    num_heads: int
    out_features: int
    normalisation: Normalisation

    @property
    def table_side(self) -> int:
        return isqrt(self.tower.num_positions)


def pieces(grid: tuple[int, ...]) -> list[tuple[int, int]]:
    """``(height, width)`` in patches of each piece of an image: the overview, then its slices row by row.

    Args:
        grid: ``(height, width, rows, columns, slice_height, slice_width)``: the overview's size in patches,
            the rows and columns of slices, and a slice's size in patches.
    """
    height, width, rows, columns, slice_height, slice_width = grid
    return [(height, width)] + [(slice_height, slice_width)] * (rows * columns)
