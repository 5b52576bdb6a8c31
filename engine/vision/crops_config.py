"""The switches of encoders that take square crops of one size. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.vision.normalisation import Normalisation
from engine.vision.transformer_config import VisionConfig


@dataclass(frozen=True, slots=True)
class CropVisionConfig:
    """A tower of fixed resolution, and a connector: an MLP, or one projection of shuffled pixels.

    Attributes:
        image_size: side of a crop in pixels.
        patch_size: side of a patch in pixels.
        keep_class_token: whether the class token's feature becomes a row as well, before the patches'.
        out_features: width of a row, and of an MLP connector's hidden layer.
        connector_activation, connector_bias: of an MLP connector.
        pixel_shuffle: side of the square of patches that one row is projected from, without MLP; None has one
            row per patch.
        bucketed_positions: learned positions are looked up by where a patch lies in the picture, as in towers
            that also take pictures of other sizes, rather than by its number.
        normalisation: of the pixels' bytes.
    """

    tower: VisionConfig
    image_size: int
    patch_size: int
    keep_class_token: bool
    out_features: int
    normalisation: Normalisation
    connector_activation: str = "gelu"
    connector_bias: bool = True
    pixel_shuffle: int | None = None
    bucketed_positions: bool = False

    @property
    def grid_side(self) -> int:
        """Patches along a crop's side."""
        return self.image_size // self.patch_size

    @property
    def patches_per_crop(self) -> int:
        return self.grid_side**2

    @property
    def rows_per_crop(self) -> int:
        if self.pixel_shuffle is not None:
            return self.patches_per_crop // self.pixel_shuffle**2
        return self.patches_per_crop + (1 if self.keep_class_token else 0)
