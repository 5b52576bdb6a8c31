"""DeepSeek-OCR 2's images: tiles of a large image, and the whole of it on a square of grey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import ImagesOnly, ModelConfig, SizedImages, sized_item
from engine.families.deepseek_ocr2.config import DeepseekVisionConfig
from engine.families.parsing.processor import (
    count_option,
    flag_option,
    lowered,
    lowered_flag,
    request_options,
)
from engine.families.tiles import best_tiling
from engine.media.image_ops import rgb_array
from engine.media.keys import content_hash
from engine.media.padding import centred, cut_in_tiles
from engine.media.resize import resize, resized
from engine.prompt import PreparedMedia

_FEWEST_TILES, _MOST_TILES = 2, 40


@dataclass(frozen=True, slots=True)
class DeepseekProcessor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`. Pixels and grids are those of
    :class:`engine.families.deepseek_ocr2.encoder.DeepseekVisionEncoder`.

    Attributes:
        image_token_id: the token that rows replace.
        most: most tiles of an image.
        tiled: whether images that are larger than a tile have tiles, and the whole is larger than a tile.
        background: colour around the whole.
        resample: PIL's filter number.
    """

    vision: DeepseekVisionConfig
    image_token_id: int
    most: int
    tiled: bool
    background: tuple[int, int, int]
    resample: int

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> DeepseekProcessor:
        """The checkpoint's processor with the options ``crop_to_patches`` and ``max_patches``.

        Raises:
            CheckpointError: naming the field that is not supported.
            ConfigError: naming the option that is out of bounds.
        """
        raw = checkpoint.preprocessor_config
        assert config.image_token_id is not None
        colour: Any = raw.get("background_color", (127, 127, 127))
        if (
            not isinstance(colour, list | tuple)
            or len(colour) != 3
            or not all(type(byte) is int and 0 <= byte < 256 for byte in colour)
        ):
            raise CheckpointError(
                f"preprocessor_config.json: background_color should be three bytes, not {colour!r}",
                param="background_color",
            )
        # Transformers' whole processor asks for up to 6 tiles, whatever the image processor's file states.
        return cls(
            vision=config.vision,
            image_token_id=config.image_token_id,
            most=count_option(options, "max_patches", 6, _MOST_TILES),
            tiled=flag_option(options, "crop_to_patches", True),
            background=(colour[0], colour[1], colour[2]),
            resample=raw.get("resample", 3),
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of an image of ``(width, height)`` pixels."""
        side = self.vision.tile_side
        if not self.tiled or max(size) <= side:
            return 1, 0, 0
        columns, rows = best_tiling(size, side, _FEWEST_TILES, self.most)
        return columns * rows + 1, rows, columns

    def check(self, size: tuple[int, int]) -> int:
        self._fitted(size)
        return self.vision.rows(self.grid(size)[0] - 1, small=not self.tiled)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        fitted = self._fitted(image.size)
        _, rows, columns = self.grid(image.size)
        tile, whole = self.vision.tile_side, self._whole_side
        pixels = np.empty(3 * (rows * columns * tile**2 + whole**2), np.uint8)
        end = len(pixels) - 3 * whole**2
        if end:
            cut_in_tiles(resize(image, (columns * tile, rows * tile), self.resample), tile, out=pixels[:end])
        shrunk = resized(image, fitted, self.resample)
        pixels[end:] = rgb_array(centred(shrunk, (whole, whole), self.background)).reshape(-1)
        key = content_hash(
            pixels,
            family="deepseek_ocr2",
            options={"tiled": self.tiled, "most": self.most},
            kind="image",
            size=image.size,
        )
        return PreparedMedia(sized_item(self, image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> DeepseekProcessor:
        options = request_options(options, "crop_to_patches", "max_patches")
        return replace(
            self,
            tiled=lowered_flag(options, "crop_to_patches", self.tiled),
            most=lowered(options, "max_patches", self.most),
        )

    def low_detail(self) -> DeepseekProcessor:
        return replace(self, tiled=False)

    @property
    def _whole_side(self) -> int:
        return self.vision.whole_side if self.tiled else self.vision.tile_side

    def _fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the whole image within its square.

        Raises:
            InvalidRequest: nothing of it would be left on one side.
        """
        scale = self._whole_side / max(size)
        width, height = round(size[0] * scale), round(size[1] * scale)
        if not width or not height:
            raise InvalidRequest(
                f"an image of {size[0]}x{size[1]} pixels is too elongated for this model", param="image"
            )
        return width, height
