"""The configuration of Gemma 4 unified's encoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.families.gemma4.config import SquareRowsConfig


@dataclass(frozen=True, slots=True)
class ProjectedVisionConfig(SquareRowsConfig):
    """Squares of patches that are projected without a tower.

    Attributes:
        width: of the features between the two projections.
        num_positions: rows of the table of learned positions of squares, each with one for columns and one
            for rows.
        norm_eps: of the norm before the second projection.
        tower: there is none.
    """

    width: int
    num_positions: int
    norm_eps: float
    tower: None = None
