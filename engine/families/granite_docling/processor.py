"""Granite-Docling's images: pages in square tiles, and the whole of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, ConfigError
from engine.families.base import ImagesOnly, ModelConfig, SizedImages, sized_item
from engine.families.granite_docling.config import TilesVisionConfig
from engine.families.parsing.processor import (
    count_option,
    flag_option,
    lowered,
    lowered_flag,
    request_options,
    require_steps,
    stated_size,
)
from engine.families.tiles import best_tiling, cut_image
from engine.media.keys import content_hash
from engine.prompt import PreparedMedia

if TYPE_CHECKING:
    from PIL import Image

#: Most tiles along a side: the tokenizer names no more.
_MOST_PER_SIDE = 16
_MOST_TILES = _MOST_PER_SIDE**2


@dataclass(frozen=True, slots=True)
class SpreadRule:
    """Selects pages that are cut into more tiles than others, such as spreads of newspapers.

    Attributes:
        tiles: the most tiles of such pages; 0 for no rule.
        scale: such pages would be shrunk to less than this part of their width; 0 asks nothing.
        narrowest, widest: the least and the greatest ratio of width to height of such pages; 0 sets no bound.
    """

    tiles: int
    scale: float
    narrowest: float
    widest: float

    def holds(self, size: tuple[int, int], columns: float, side: int) -> bool:
        """Return whether a page of ``(width, height)`` pixels, which would have ``columns`` of tiles of
        ``side`` pixels, is such a page."""
        width, height = size
        ratio = width / height
        if not self.tiles or (self.scale <= 0 and self.narrowest <= 0):
            return False
        if (self.narrowest > 0 and not ratio > self.narrowest) or (self.widest > 0 and ratio > self.widest):
            return False
        return self.scale <= 0 or columns * side / width < self.scale


@dataclass(frozen=True, slots=True)
class GraniteDoclingProcessor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`.

    Grids are ``(crops, rows, columns)``: the tiles row by row, then the whole page as one more; a page in one
    tile has 1, 1 and 1.

    Attributes:
        side: of a tile, in pixels.
        rows: embedding rows of a tile by the coarse connector.
        image_token_id: the token that rows replace.
        fewest, most: bounds of the number of tiles.
        tiled: whether pages are cut into tiles.
        fine: whether rows are those of the fine connector, four times as many.
        spreads: which pages may have more tiles.
        resample: PIL's filter number.
    """

    side: int
    rows: int
    image_token_id: int
    fewest: int
    most: int
    tiled: bool
    fine: bool
    spreads: SpreadRule
    resample: int

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> GraniteDoclingProcessor:
        """The checkpoint's processor with the options ``crop_to_patches``, ``max_patches``, ``fine_route``.

        Raises:
            CheckpointError: naming the field that doesn't fit the tower.
            ConfigError: naming the option that is out of bounds.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, TilesVisionConfig) and config.image_token_id is not None
        require_steps(raw, "do_resize")
        sides = set((stated_size(raw) or {"height": 512, "width": 512}).values())
        if sides != {vision.image_size}:
            raise CheckpointError(
                f"preprocessor_config.json: size should be the tower's {vision.image_size} pixels",
                param="size",
            )
        fine = flag_option(options, "fine_route", raw.get("fine_route", False))
        if fine and not vision.fine:
            raise ConfigError("fine_route: this checkpoint has no fine connector", param="fine_route")
        dense = [raw.get(f"dense_{field}", 0) for field in ("max_patches", "max_scale")]
        aspects = [raw.get(f"dense_{bound}_aspect", 0) for bound in ("min", "max")]
        return cls(
            side=vision.image_size,
            rows=vision.rows_per_tile(False),
            image_token_id=config.image_token_id,
            fewest=raw.get("min_patches", 1),
            most=count_option(options, "max_patches", raw.get("max_patches", 32), _MOST_TILES),
            tiled=flag_option(options, "crop_to_patches", raw.get("crop_to_patches", True)),
            fine=fine,
            spreads=SpreadRule(*dense, *aspects),
            resample=raw.get("resample", 3),
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of a page of ``(width, height)`` pixels."""
        columns, rows = self._tiling(size)
        return (columns * rows + 1 if columns * rows > 1 else 1), rows, columns

    def check(self, size: tuple[int, int]) -> int:
        return self.grid(size)[0] * self.rows * (4 if self.fine else 1)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        grid = self.grid(image.size)
        pixels = cut_image(image, self.side, grid, self.resample)
        options = {"fine": self.fine, "grid": grid}
        key = content_hash(pixels, family="granite_docling", options=options, kind="image", size=image.size)
        return PreparedMedia(sized_item(self, image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> GraniteDoclingProcessor:
        options = request_options(options, "crop_to_patches", "max_patches", "fine_route")
        most = lowered(options, "max_patches", self.most)
        return replace(
            self,
            tiled=lowered_flag(options, "crop_to_patches", self.tiled),
            fine=lowered_flag(options, "fine_route", self.fine),
            most=most,
            # Who asks for fewer tiles gets no more by the rule.
            spreads=self.spreads if most == self.most else replace(self.spreads, tiles=0),
        )

    def low_detail(self) -> GraniteDoclingProcessor:
        return replace(self, tiled=False)

    def _tiling(self, size: tuple[int, int]) -> tuple[int, int]:
        """``(columns, rows)`` of a page."""
        if not self.tiled or self.most <= 1:
            return 1, 1
        usual = best_tiling(size, self.side, self.fewest, self.most, _MOST_PER_SIDE)
        if not self.spreads.holds(size, usual[0], self.side):
            return usual
        if self.spreads.tiles <= 1:
            return 1, 1
        return best_tiling(size, self.side, self.fewest, self.spreads.tiles, _MOST_PER_SIDE)
