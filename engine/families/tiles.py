"""Images that are shown as a whole and in square tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np

from engine.errors import CheckpointError
from engine.families.base import ModelConfig, SizedImages, sized_item
from engine.families.parsing.processor import (
    count_option,
    flag_option,
    lowered,
    lowered_flag,
    request_options,
    stated_size,
)
from engine.media.keys import content_hash
from engine.media.padding import cut_in_tiles
from engine.media.resize import resize
from engine.prompt import MediaItem, PlaceholderRun, PreparedMedia, runs_with_rows

if TYPE_CHECKING:
    from PIL import Image

_DEFAULT_SIDE = 384
"""Of Transformers' image and video processors, for files that state no size."""
_MAX_TILES = 40


class SquareCrops(Protocol):
    """The vision part of a model whose tower takes square crops of one size."""

    @property
    def image_size(self) -> int:
        """Side of a crop in pixels."""

    @property
    def rows_per_crop(self) -> int:
        """Embedding rows of a crop."""


@dataclass(frozen=True, slots=True)
class TiledImages(SizedImages):
    """The part of a processor that cuts an image into tiles, squares of the tower's size.

    Grids are ``(crops, rows, columns)``: the tiles row by row, then the whole image as one more; an image in
    one crop has 1, 0 and 0.

    Attributes:
        family: the family's name.
        whole_first: whether the whole image comes before its tiles, not behind them.
        side: of a crop, in pixels.
        rows: embedding rows per crop.
        image_token_id: the token that rows replace.
        min_tiles, max_tiles: bounds of the number of tiles; the first counts for tilings by aspect ratio.
        tiled: whether images are cut into tiles.
        resample: PIL's filter number.
    """

    family: ClassVar[str]
    whole_first: ClassVar[bool] = False

    side: int
    rows: int
    image_token_id: int
    min_tiles: int = 1
    max_tiles: int = 12
    tiled: bool = True
    resample: int = 3

    @classmethod
    def of_tower(
        cls,
        config: ModelConfig,
        limits: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        tiled: bool = True,
        **own: Any,
    ) -> Self:
        """The processor of a model's tower with the options ``crop_to_patches`` and ``max_patches``.

        Args:
            limits: the model's ``min_patches`` and ``max_patches``, 1 and 12 where they are missing.
            tiled: whether images are cut into tiles where ``options`` don't say.
            own: further attributes.

        Raises:
            ConfigError: naming the option that is out of bounds.
        """
        vision: SquareCrops = config.vision
        assert config.image_token_id is not None
        return cls(
            side=vision.image_size,
            rows=vision.rows_per_crop,
            image_token_id=config.image_token_id,
            min_tiles=limits.get("min_patches", 1),
            tiled=flag_option(options, "crop_to_patches", tiled),
            max_tiles=count_option(options, "max_patches", limits.get("max_patches", 12), _MAX_TILES),
            **own,
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of an image of ``(width, height)`` pixels."""
        if not self.tiled or self.max_tiles == 1:
            return 1, 0, 0
        columns, rows = self.tiling(size)
        return (columns * rows + 1, rows, columns) if columns * rows > 1 else (1, 0, 0)

    def tiling(self, size: tuple[int, int]) -> tuple[int, int]:
        """The tiling ``(columns, rows)`` of an image of ``(width, height)`` pixels."""
        return best_tiling(size, self.side, self.min_tiles, self.max_tiles)

    def check(self, size: tuple[int, int]) -> int:
        return self.grid(size)[0] * self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        grid = self.grid(image.size)
        pixels = cut_image(image, self.side, grid, self.resample, whole_first=self.whole_first)
        key = content_hash(pixels, family=self.family, options=self._options, kind="image", size=image.size)
        return PreparedMedia(sized_item(self, image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        options = request_options(options, "crop_to_patches", "max_patches")
        return replace(
            self,
            tiled=lowered_flag(options, "crop_to_patches", self.tiled),
            max_tiles=lowered(options, "max_patches", self.max_tiles),
        )

    def low_detail(self) -> Self:
        return replace(self, tiled=False)

    @property
    def _options(self) -> dict[str, Any]:
        """Options of the processor that enter an image's content hash."""
        return {"tiled": self.tiled, "tiles": (self.min_tiles, self.max_tiles)}


def cut_image(
    image: Image.Image, side: int, grid: tuple[int, int, int], resample: int, *, whole_first: bool = False
) -> np.ndarray:
    """The tiles of an image, row by row, and the whole behind them: uint8 ``(crops, side, side, 3)``.

    Args:
        grid: ``(crops, rows, columns)``; an image in one crop has no tiles.
        resample: PIL's filter number.
        whole_first: the whole comes before the tiles instead.
    """
    crops, rows, columns = grid
    pixels = np.empty((crops, side, side, 3), np.uint8)
    whole, tiles = (pixels[0], pixels[1:]) if whole_first else (pixels[-1], pixels[:-1])
    whole[...] = resize(image, (side, side), resample)
    if crops > 1:
        cut_in_tiles(resize(image, (columns * side, rows * side), resample), side, out=tiles)
    return pixels


def part_runs(
    config: ModelConfig, item: MediaItem, parts: int, tokens: Sequence[int], row: str
) -> tuple[PlaceholderRun, ...]:
    """The ``tokens`` of an item as runs: each of its ``parts`` has one token ``row`` and equally many rows.

    Raises:
        CheckpointError: the tokenizer, which made ``tokens``, has no token ``row``.
    """
    runs = runs_with_rows(tokens, config.image_token_id, repeat(item.num_tokens // parts))
    if sum(run.is_embed for run in runs) != parts:
        raise CheckpointError(f"the tokenizer has no token {row}, which this model's images need")
    return runs


@lru_cache(maxsize=16)
def tilings(least: int, most: int, longest: int | None = None) -> list[tuple[int, int]]:
    """``(columns, rows)`` of all tilings of ``least`` to ``most`` tiles by their number of tiles.

    Args:
        longest: most tiles along a side; None for no bound.
    """
    sides = range(1, min(most, longest or most) + 1)
    every = [(columns, rows) for columns in sides for rows in sides]
    return sorted((t for t in every if least <= t[0] * t[1] <= most), key=lambda t: t[0] * t[1])


def best_tiling(
    size: tuple[int, int], side: int, least: int, most: int, longest: int | None = None
) -> tuple[int, int]:
    """The tiling ``(columns, rows)`` with the aspect ratio closest to that of ``size`` ``(width, height)``.

    Of equally close ones, a larger tiling is taken if the image has more than half of its pixels. As
    Transformers' ``GotOcr2ImageProcessor`` chooses.

    Args:
        longest: most tiles along a side; None for no bound.
    """
    ratio, area = size[0] / size[1], size[0] * size[1]
    best, least_difference = (1, 1), float("inf")
    for tiling in tilings(least, most, longest):
        difference = abs(ratio - tiling[0] / tiling[1])
        larger = area > 0.5 * side * side * tiling[0] * tiling[1]
        if difference < least_difference or (difference == least_difference and larger):
            best, least_difference = tiling, difference
    return best


def require_side(file: str, raw: Mapping[str, Any], side: int, usual: int = _DEFAULT_SIDE) -> None:
    """Refuse a processor's JSON, ``raw``, whose ``size`` isn't a square of the tower's ``side``.

    Args:
        usual: the side where ``raw`` states none.

    Raises:
        CheckpointError: naming ``file`` and the field.
    """
    size = stated_size(raw) or (dict.fromkeys(("height", "width"), usual) if raw else {})
    if {size.get("height", side), size.get("width", side)} != {side} or size.keys() - {"height", "width"}:
        raise CheckpointError(f"{file}: size should be the tower's {side} pixels, not {size}", param="size")
