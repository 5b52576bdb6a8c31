"""The configuration of Phi-3.5-vision's encoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class HDVisionConfig:
    """A CLIP tower for square crops, and an MLP for patches joined two by two.

    Attributes:
        tower: the transformer.
        image_size: side of a crop in pixels.
        patch_size: side of a patch in pixels.
        out_features: width of a row, and of the connector's hidden layer.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    image_size: int
    patch_size: int
    out_features: int
    normalisation: Normalisation

    @property
    def side(self) -> int:
        """Patches along a crop's side."""
        return self.image_size // self.patch_size

    def num_rows(self, grid: tuple[int, ...]) -> int:
        """Number of rows of an image with ``(down, across)`` crops: the stitched crops, the separator and the
        overview, with a newline row after each line of joined patches."""
        joined = self.side // 2
        down, across = grid
        return down * joined * (across * joined + 1) + 1 + joined * (joined + 1)
