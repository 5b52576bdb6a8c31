"""Ovis2's images: the whole and its tiles, squares of the tower's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ImagesOnly, ModelConfig, SizedImages, sized_item
from engine.families.internvl.processor import best_tiling, require_side, tilings
from engine.families.ovis2.layout import num_indicators
from engine.families.parsing.processor import (
    count_option,
    flag_option,
    lowered,
    lowered_flag,
    request_options,
    require_steps,
)
from engine.media.keys import content_hash
from engine.media.padding import cut_in_tiles
from engine.media.resize import resize
from engine.prompt import PreparedMedia
from engine.vision.crops_config import CropVisionConfig

if TYPE_CHECKING:
    from PIL import Image

_COVERED = 0.9
"""Share of an image's area that tiles should show at its own resolution."""
_MAX_TILES = 40


@dataclass(frozen=True, slots=True)
class Ovis2Processor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`; grids are those of
    :func:`engine.families.ovis2.layout.parts`.

    Attributes:
        side: of a crop, in pixels.
        rows: embedding rows per crop.
        image_token_id: the token that the rows of crops replace.
        min_tiles, max_tiles: bounds of the number of tiles; the first counts for tilings by aspect ratio.
        tiled: whether images are cut into tiles.
        covering: whether tiles should cover the image at its own resolution, else keep its aspect ratio.
        resample: PIL's filter number.
    """

    side: int
    rows: int
    image_token_id: int
    min_tiles: int = 1
    max_tiles: int = 12
    tiled: bool = False
    covering: bool = True
    resample: int = 3

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> Ovis2Processor:
        """The checkpoint's processor with the options ``crop_to_patches`` and ``max_patches``.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
            ConfigError: naming the option that is out of bounds.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        require_steps(raw, "do_resize")
        require_side("preprocessor_config.json", raw, vision.image_size)
        if raw.get("do_center_crop"):
            raise CheckpointError(
                "preprocessor_config.json: do_center_crop true is not supported", param="do_center_crop"
            )
        tiled = flag_option(options, "crop_to_patches", raw.get("crop_to_patches", False))
        return cls(
            vision.image_size,
            vision.rows_per_crop,
            config.image_token_id,
            raw.get("min_patches", 1),
            count_option(options, "max_patches", raw.get("max_patches", 12), _MAX_TILES),
            tiled,
            raw.get("use_covering_area_grid", True),
            raw.get("resample", 3),
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of an image of ``(width, height)`` pixels."""
        if not self.tiled or self.max_tiles == 1:
            return 1, 0, 0
        if self.covering:
            columns, rows = covering_tiling(size, self.side, self.max_tiles)
        else:
            columns, rows = best_tiling(size, self.side, self.min_tiles, self.max_tiles)
        return (columns * rows + 1, rows, columns) if columns * rows > 1 else (1, 0, 0)

    def check(self, size: tuple[int, int]) -> int:
        grid = self.grid(size)
        return grid[0] * self.rows + num_indicators(grid)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        crops, rows, columns = self.grid(image.size)
        pixels = np.empty((crops, self.side, self.side, 3), np.uint8)
        pixels[0] = resize(image, (self.side, self.side), self.resample)
        if rows:
            whole = resize(image, (columns * self.side, rows * self.side), self.resample)
            cut_in_tiles(whole, self.side, out=pixels[1:])
        key = content_hash(pixels, family="ovis2", options=self._options, kind="image", size=image.size)
        return PreparedMedia(sized_item(self, image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> Ovis2Processor:
        options = request_options(options, "crop_to_patches", "max_patches")
        return replace(
            self,
            tiled=lowered_flag(options, "crop_to_patches", self.tiled),
            max_tiles=lowered(options, "max_patches", self.max_tiles),
        )

    def low_detail(self) -> Ovis2Processor:
        return replace(self, tiled=False)

    @property
    def _options(self) -> dict[str, Any]:
        return {"tiled": self.tiled, "tiles": (self.min_tiles, self.max_tiles), "covering": self.covering}


@lru_cache(maxsize=1024)
def covering_tiling(size: tuple[int, int], side: int, most: int) -> tuple[int, int]:
    """The tiling ``(columns, rows)`` with the fewest tiles that show most of an image of ``(width, height)``.

    As Transformers' ``Ovis2ImageProcessor`` chooses: it compares tilings by their rows and columns, and then
    takes the rows of the best one for columns.
    """
    shares = {(a, b): _covered(size, side, down=a, along=b) for a, b in tilings(1, most)}
    enough = {tiling: share for tiling, share in shares.items() if share > _COVERED}
    if enough:
        return min(enough, key=lambda tiling: (tiling[0] * tiling[1], -enough[tiling]))
    return min(shares, key=lambda tiling: (-shares[tiling], tiling[0] * tiling[1]))


def _covered(size: tuple[int, int], side: int, *, down: int, along: int) -> float:
    """The share of an image's area that ``down`` by ``along`` tiles of ``side`` pixels show.

    A tile shows its part at its own resolution, or shrunk until the longer edge fits.
    """
    widths, heights = _cut(size[0], along), _cut(size[1], down)
    shown = {(w, h): _shown(w, h, side) for w in {*widths} for h in {*heights}}
    # In the order of the tiles: a sum of floats depends on it.
    return sum(shown[w, h] for h in heights for w in widths) / (size[0] * size[1])


def _cut(length: int, count: int) -> list[int]:
    """``count`` parts of a length; the last one has what division leaves over."""
    part = length // count
    return [part] * (count - 1) + [length - part * (count - 1)]


def _shown(width: int, height: int, side: int) -> float:
    longer, shorter = max(width, height), min(width, height)
    return side * (shorter / longer * side) if longer > side else longer * shorter
