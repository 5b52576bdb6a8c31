"""The configuration of Gemma 4's encoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class PooledVisionConfig:
    """A tower for images of any size, whose features are averaged over squares.

    Attributes:
        tower: the transformer, without learned positions.
        patch_size: side of a patch in pixels.
        num_positions: rows of the tables of learned positions, one for columns and one for rows.
        side: side, in patches, of the square that becomes one row.
        standardised: averages are shifted and scaled by learned vectors.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    patch_size: int
    num_positions: int
    side: int
    standardised: bool
    out_features: int
    normalisation: Normalisation
