"""Aya Vision's and Command A Vision's images: tiles and the whole, squares of the tower's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.families.base import ImagesOnly, ModelConfig, SizedImages, sized_item
from engine.families.internvl.processor import best_tiling, cut_image, require_side, tilings
from engine.families.parsing.processor import (
    count_option,
    flag_option,
    lowered,
    lowered_flag,
    request_options,
    require_steps,
)
from engine.media.keys import content_hash
from engine.prompt import PreparedMedia
from engine.vision.crops_config import CropVisionConfig

if TYPE_CHECKING:
    from PIL import Image

_MAX_TILES = 40


@dataclass(frozen=True, slots=True)
class AyaVisionProcessor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`.

    Grids are ``(crops, rows, columns)``: the tiles row by row, then the whole image as one more; an image in
    one crop has 1, 0 and 0.

    Attributes:
        side: of a crop, in pixels.
        rows: embedding rows per crop.
        image_token_id: the token that rows replace.
        min_tiles, max_tiles: bounds of the number of tiles; the first counts for tilings by aspect ratio.
        tiled: whether images are cut into tiles.
        enlarging: whether tiles are those into which an image fits at the least enlargement (Command A
            Vision), else those closest to its aspect ratio.
        resample: PIL's filter number.
    """

    side: int
    rows: int
    image_token_id: int
    min_tiles: int = 1
    max_tiles: int = 12
    tiled: bool = True
    enlarging: bool = False
    resample: int = 3

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
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        require_steps(raw, "do_resize")
        require_side("preprocessor_config.json", raw, vision.image_size, 512 if enlarging else 384)
        # Aya Vision's whole processor asks for tiles, whatever the image processor's file states.
        tiled = raw.get("crop_to_patches", True) if enlarging else True
        return cls(
            vision.image_size,
            vision.rows_per_crop,
            config.image_token_id,
            raw.get("min_patches", 1),
            count_option(options, "max_patches", raw.get("max_patches", 12), _MAX_TILES),
            flag_option(options, "crop_to_patches", tiled),
            enlarging,
            raw.get("resample", 3),
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of an image of ``(width, height)`` pixels."""
        if not self.tiled or self.max_tiles == 1:
            return 1, 0, 0
        if self.enlarging:
            columns, rows = enlarging_tiling(size, self.side, self.max_tiles)
        else:
            columns, rows = best_tiling(size, self.side, self.min_tiles, self.max_tiles)
        return (columns * rows + 1, rows, columns) if columns * rows > 1 else (1, 0, 0)

    def check(self, size: tuple[int, int]) -> int:
        return self.grid(size)[0] * self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        pixels = cut_image(image, self.side, self.grid(image.size), self.resample)
        key = content_hash(pixels, family="aya_vision", options=self._options, kind="image", size=image.size)
        return PreparedMedia(sized_item(self, image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> AyaVisionProcessor:
        options = request_options(options, "crop_to_patches", "max_patches")
        return replace(
            self,
            tiled=lowered_flag(options, "crop_to_patches", self.tiled),
            max_tiles=lowered(options, "max_patches", self.max_tiles),
        )

    def low_detail(self) -> AyaVisionProcessor:
        return replace(self, tiled=False)

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
