"""The configuration of Gemma 4's encoder, and what it shares with its relatives. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class SquareRowsConfig:
    """Images of any size, cut into squares of patches, each of which becomes one row.

    Attributes:
        patch_size: side of a patch in pixels.
        side: of a square, in patches.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
    """

    patch_size: int
    side: int
    out_features: int
    normalisation: Normalisation


@dataclass(frozen=True, slots=True)
class PooledVisionConfig(SquareRowsConfig):
    """A tower whose features are averaged over squares.

    Attributes:
        tower: the transformer, without learned positions.
        num_positions: rows of the tables of learned positions of patches, one for columns and one for rows.
        standardised: averages are shifted and scaled by learned vectors.
    """

    tower: VisionConfig
    num_positions: int
    standardised: bool
