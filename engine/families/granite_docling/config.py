"""The configuration of Granite-Docling's encoder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class TilesVisionConfig:
    """A tower for square tiles, and two connectors to rows: a coarse one, and a fine one with four times as
    many rows.

    Attributes:
        tower: the transformer.
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        square: side, in patches, of the square that becomes one coarse row; half of it one fine row.
        fine: whether the checkpoint has the fine connector.
        deepstack_layers: the tower's blocks whose outputs are projected for the decoder's first layers,
            ascending.
        out_features: width of a row, without what the decoder's first layers get.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    image_size: int
    patch_size: int
    square: int
    fine: bool
    deepstack_layers: tuple[int, ...]
    out_features: int
    normalisation: Normalisation

    @property
    def grid_side(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    def rows_per_tile(self, fine: bool) -> int:
        """Rows of a tile by the coarse or the fine connector."""
        return (self.grid_side // self.square) ** 2 * (4 if fine else 1)
