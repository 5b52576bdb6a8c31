"""The configuration of LFM2-VL's encoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.vision.mlp_config import MLPConfig
from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class TileVisionConfig:
    """A SigLIP2 tower for images of any size, and a projector of squares of its features.

    Attributes:
        tower: the transformer, without learned positions.
        patch_size: side of a patch in pixels.
        position_side: side of the square table of learned positions that is resized to an image's grid.
        merge_size: side, in patches, of the square that becomes one row.
        norm: whether the features of a square are normalised before the projection.
        hidden_size: width of the projector's hidden layer.
        mlp: the projector's activation, and whether it has biases.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    patch_size: int
    position_side: int
    merge_size: int
    norm: bool
    hidden_size: int
    mlp: MLPConfig
    out_features: int
    normalisation: Normalisation


def pieces(grid: tuple[int, ...]) -> list[tuple[int, int]]:
    """``(height, width)`` in patches of each piece of an image: its tiles row by row, then the whole.

    Args:
        grid: ``(rows, columns, side, height, width)``: rows and columns of tiles, a tile's side in patches,
            and the size in patches of the whole image, 0 and 0 if that is left out.
    """
    rows, columns, side, height, width = grid
    return [(side, side)] * (rows * columns) + ([(height, width)] if height else [])


def num_patches(grid: tuple[int, ...]) -> int:
    """Patches of all pieces."""
    return sum(height * width for height, width in pieces(grid))
