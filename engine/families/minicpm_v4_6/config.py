"""The configuration of MiniCPM-V 4.6's encoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.families.minicpm_v.config import pieces
from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class MergedVisionConfig:
    """A tower with bucketed positions that merges windows of 2 by 2 patches, and a merger behind it.

    Attributes:
        tower: the transformer; its learned positions are a square table.
        merged_after: the block behind which windows are merged; None if no windows are.
        patch_size: side of a patch in pixels.
        position_side: side of the table of positions.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    merged_after: int | None
    patch_size: int
    position_side: int
    out_features: int
    normalisation: Normalisation

    @property
    def side(self) -> int:
        """Side, in patches, of the square that becomes one row."""
        return 2 if self.merged_after is None else 4


def all_pieces(grid: tuple[int, ...]) -> list[tuple[int, int]]:
    """``(height, width)`` in patches of each piece of an image, or of each frame of a video, one by one.

    Args:
        grid: an image's, see :func:`engine.families.minicpm_v.config.pieces`; a video's is that of a frame
            with the number of frames behind it.
    """
    image, frames = grid[:6], grid[6:]
    return pieces(image) * (frames[0] if frames else 1)
