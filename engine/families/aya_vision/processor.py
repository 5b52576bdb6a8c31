"""Aya Vision's and Command A Vision's images: tiles and the whole, squares of the tower's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.checkpoint.folder import Checkpoint
from engine.families.base import ImagesOnly, ModelConfig
from engine.families.parsing.processor import require_steps
from engine.families.tiles import TiledImages, best_tiling, require_side, tilings
from engine.vision.crops_config import CropVisionConfig


@dataclass(frozen=True, slots=True)
class AyaVisionProcessor(TiledImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`.

    Attributes:
        enlarging: whether tiles are those into which an image fits at the least enlargement (Command A
            Vision), else those closest to its aspect ratio.
    """

    family: ClassVar[str] = "aya_vision"

    enlarging: bool = False

    @classmethod
    def create(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        options: Mapping[str, Any],
        *,
        enlarging: bool,
    ) -> AyaVisionProcessor:
        """The checkpoint's processor with the options ``crop_to_patches`` and ``max_patches``.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
            ConfigError: naming the option that is out of bounds.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig)
        require_steps(raw, "do_resize")
        require_side("preprocessor_config.json", raw, vision.image_size, 512 if enlarging else 384)
        # Aya Vision's whole processor asks for tiles, whatever the image processor's file states.
        tiled = raw.get("crop_to_patches", True) if enlarging else True
        return cls.of_tower(
            config, raw, options, tiled=tiled, resample=raw.get("resample", 3), enlarging=enlarging
        )

    def tiling(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.enlarging:
            return enlarging_tiling(size, self.side, self.max_tiles)
        return best_tiling(size, self.side, self.min_tiles, self.max_tiles)

    @property
    def _options(self) -> dict[str, Any]:
        return {"tiled": self.tiled, "tiles": (self.min_tiles, self.max_tiles), "enlarging": self.enlarging}


def enlarging_tiling(size: tuple[int, int], side: int, most: int) -> tuple[int, int]:
    """The tiling ``(columns, rows)`` into which an image of ``(width, height)`` fits with its aspect ratio at
    the least enlargement, or the least reduction where all are too small. As Transformers'
    ``Cohere2VisionImageProcessor`` chooses.
    """
    width, height = size
    scales = {
        (columns, rows): min(columns * side / width, rows * side / height)
        for columns, rows in tilings(1, most)
    }
    larger = [tiling for tiling, scale in scales.items() if scale >= 1]
    return min(larger, key=scales.__getitem__) if larger else max(scales, key=scales.__getitem__)
