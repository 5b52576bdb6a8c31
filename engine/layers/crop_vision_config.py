"""The switches of encoders that take square crops of one size. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.vision_config import VisionConfig


@dataclass(frozen=True, slots=True)
class CropVisionConfig:
    """A tower of fixed resolution with an MLP connector.

    Attributes:
        image_size: side of a crop in pixels.
        patch_size: side of a patch in pixels.
        keep_class_token: whether the class token's feature becomes a row as well, before the patches'.
        out_features: width of a row, and of the connector's hidden layer.
        connector_activation, connector_bias: of the connector.
        mean, std, scale: normalisation of bytes, per channel.
    """

    tower: VisionConfig
    image_size: int
    patch_size: int
    keep_class_token: bool
    out_features: int
    connector_activation: str
    connector_bias: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    @property
    def patches_per_crop(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def rows_per_crop(self) -> int:
        return self.patches_per_crop + (1 if self.keep_class_token else 0)
