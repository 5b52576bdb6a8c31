"""The encoders that several families share, each for :attr:`engine.families.family.Family.build_encoder`.

Their modules need torch, so they are imported when an encoder is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.families.base import MediaEncoder, ModelConfig

if TYPE_CHECKING:
    from engine.layers.build import BuildContext


def crop_encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    """The encoder of square crops of one size."""
    from engine.vision.crops import CropVisionEncoder

    return CropVisionEncoder(config.vision, build)


def anyres_encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    """The encoder of images as a whole and in tiles."""
    from engine.vision.anyres_encoder import AnyresVisionEncoder

    return AnyresVisionEncoder(config.vision, build)


def native_encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    """The encoder of images at their own resolution."""
    from engine.vision.native import NativeVisionEncoder

    return NativeVisionEncoder(config.vision, build)
