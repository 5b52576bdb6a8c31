"""LFM2-VL's images: resized to whole squares of patches; large ones also cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import ImagesOnly, ModelConfig, SizedImages
from engine.families.lfm2_vl.config import TileVisionConfig, num_patches, pieces
from engine.families.parsing.processor import (
    count_option,
    flag_option,
    lowered,
    lowered_flag,
    request_options,
)
from engine.families.tiles import best_tiling
from engine.media.keys import content_hash
from engine.media.resize import resize
from engine.prompt import PreparedMedia

if TYPE_CHECKING:
    from PIL import Image

_DEFAULTS: dict[str, Any] = {
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
    "resample": 2,
}
_MOST_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Lfm2VlProcessor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`. Pixels are patches; grids are those of
    :func:`engine.families.lfm2_vl.config.pieces`.

    Attributes:
        patch: side of a patch in pixels.
        merge: side, in patches, of the square that becomes one row.
        image_token_id: the token that rows replace.
        tokens: least and most rows of an image as a whole.
        tile: side of a tile in pixels.
        tiles: least and most tiles.
        tolerance: an image larger than the most rows by this factor is cut into tiles.
        split: whether images are cut into tiles.
        whole: whether an image in tiles is shown as a whole too.
        resample: PIL's filter number.
    """

    patch: int
    merge: int
    image_token_id: int
    tokens: tuple[int, int]
    tile: int
    tiles: tuple[int, int]
    tolerance: float
    split: bool
    whole: bool
    resample: int

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> Lfm2VlProcessor:
        """The checkpoint's processor with the options ``do_image_splitting`` and ``max_image_tokens``.

        Raises:
            CheckpointError: naming the field that doesn't fit the tower.
            ConfigError: naming the option that is out of bounds.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, TileVisionConfig) and config.image_token_id is not None
        wanted = {"encoder_patch_size": vision.patch_size, "downsample_factor": vision.merge_size}
        for field, value in wanted.items():
            if raw.get(field, {"encoder_patch_size": 16, "downsample_factor": 2}[field]) != value:
                raise CheckpointError(
                    f"preprocessor_config.json: {field} should be the tower's {value}", param=field
                )
        filled = {**_DEFAULTS, **raw}
        factor = vision.patch_size * vision.merge_size
        if filled["tile_size"] % factor:
            raise CheckpointError(
                f"preprocessor_config.json: tile_size {filled['tile_size']} should be a multiple of {factor}",
                param="tile_size",
            )
        most = count_option(options, "max_image_tokens", filled["max_image_tokens"], _MOST_TOKENS)
        return cls(
            patch=vision.patch_size,
            merge=vision.merge_size,
            image_token_id=config.image_token_id,
            tokens=(min(filled["min_image_tokens"], most), most),
            tile=filled["tile_size"],
            tiles=(filled["min_tiles"], filled["max_tiles"]),
            tolerance=filled["max_pixels_tolerance"],
            split=flag_option(options, "do_image_splitting", filled["do_image_splitting"]),
            whole=filled["use_thumbnail"],
            resample=filled["resample"],
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The grid of an image of ``(width, height)`` pixels."""
        height, width = self._whole_size(size)
        if not self._is_large(size) or not self.split or self.tiles == (1, 1):
            return 0, 0, 0, height, width
        columns, rows = best_tiling(size, self.tile, *self.tiles)
        if rows * columns == 1:
            return 0, 0, 0, height, width
        whole = (height, width) if self.whole else (0, 0)
        return rows, columns, self.tile // self.patch, *whole

    def check(self, size: tuple[int, int]) -> int:
        grid = self.grid(size)
        most = max(self.tokens[1] * self.merge**2, (self.tile // self.patch) ** 2 if self.split else 0)
        if any(height * width > most for height, width in pieces(grid)):
            raise InvalidRequest(
                f"an image of {size[0]}x{size[1]} pixels is too elongated for this model", param="image"
            )
        return num_patches(grid) // self.merge**2

    def prepare(self, image: Image.Image) -> PreparedMedia:
        self.check(image.size)
        grid = self.grid(image.size)
        rows, columns, side, height, width = grid
        parts = []
        if rows:
            parts.append(self._cut(image, (side, side), (rows, columns)))
        if height:
            parts.append(self._cut(image, (height, width), (1, 1)))
        patches = np.concatenate(parts)
        options = {"grid": list(grid)}
        key = content_hash(patches, family="lfm2_vl", options=options, kind="image", size=image.size)
        return PreparedMedia(self.embedding_item(image.size, key), patches)

    def with_options(self, options: Mapping[str, Any]) -> Lfm2VlProcessor:
        options = request_options(options, "do_image_splitting", "max_image_tokens")
        most = lowered(options, "max_image_tokens", self.tokens[1])
        split = lowered_flag(options, "do_image_splitting", self.split)
        return replace(self, split=split, tokens=(min(self.tokens[0], most), most))

    def low_detail(self) -> Lfm2VlProcessor:
        return replace(self, split=False)

    def _whole_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, in patches, of an image of ``(width, height)`` pixels as a whole."""
        width, height = size
        factor = self.patch * self.merge
        least, most = (tokens * factor**2 for tokens in self.tokens)
        down, along = (max(factor, _nearest(side, factor)) for side in (height, width))
        if down * along > most:
            ratio = math.sqrt(height * width / most)
            down, along = (max(factor, math.floor(s / ratio / factor) * factor) for s in (height, width))
        elif down * along < least:
            ratio = math.sqrt(least / (height * width))
            down, along = (math.ceil(s * ratio / factor) * factor for s in (height, width))
        return down // self.patch, along // self.patch

    def _is_large(self, size: tuple[int, int]) -> bool:
        factor = self.patch * self.merge
        width, height = (max(self.patch, _nearest(side, factor)) for side in size)
        return width * height > self.tokens[1] * factor**2 * self.tolerance

    def _cut(self, image: Image.Image, piece: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
        """Resize the image to ``grid`` (rows and columns) of pieces (in patches) and cut it into patches:
        uint8 ``(N, patch², 3)``, piece by piece, in the encoder's order."""
        (height, width), (rows, columns) = piece, grid
        side, merge = self.patch, self.merge
        pixels = resize(image, (columns * width * side, rows * height * side), self.resample)
        split = (rows, height // merge, merge, side, columns, width // merge, merge, side, 3)
        parts = pixels.reshape(split).transpose(0, 4, 1, 5, 2, 6, 3, 7, 8)
        return parts.reshape(-1, side * side, 3)


def _nearest(length: int, factor: int) -> int:
    """The multiple of ``factor`` that is closest to ``length``."""
    return round(length / factor) * factor
