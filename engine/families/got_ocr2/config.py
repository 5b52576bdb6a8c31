"""The configuration of GOT-OCR 2's vision part. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.vision.normalisation import Normalisation
from engine.vision.sam_config import SamConfig


@dataclass(frozen=True, slots=True)
class GotVisionConfig:
    """A SAM tower for square crops, and a projection of its features.

    Attributes:
        out_features: width of a row.
        normalisation: of the pixels' bytes.
    """

    tower: SamConfig
    out_features: int
    normalisation: Normalisation

    @property
    def image_size(self) -> int:
        """Side of a crop in pixels."""
        return self.tower.image_size

    @property
    def rows_per_crop(self) -> int:
        return self.tower.rows(self.tower.grid_side)
