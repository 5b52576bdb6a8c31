"""The configuration of MiniCPM-V 4.6's encoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

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
