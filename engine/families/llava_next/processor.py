"""LLaVA-NeXT's images: the whole and its tiles, squares of the tower's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ImagesOnly, ModelConfig, SizedImages, sized_item
from engine.families.parsing.anyres import require_pinpoints
from engine.families.parsing.processor import require_steps, stated_size
from engine.media.keys import content_hash
from engine.media.padding import whole_and_tiles
from engine.prompt import PreparedMedia
from engine.vision.anyres import AnyresConfig

if TYPE_CHECKING:
    from PIL import Image

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""The tilings of the public models with a tower of 336 pixels, ``(height, width)``."""

_DEFAULT_SIDE = 224
"""Of Transformers' LlavaNextImageProcessor, for a preprocessor_config.json that states no size."""


@dataclass(frozen=True, slots=True)
class LlavaNextProcessor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`; grids are those of
    :class:`engine.vision.anyres_encoder.AnyresVisionEncoder`.

    Attributes:
        vision: the tower and the tilings.
        image_token_id: the token that rows replace.
        resample: PIL's filter number.
    """

    vision: AnyresConfig
    image_token_id: int
    resample: int = 3

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> LlavaNextProcessor:
        """The checkpoint's processor; it has no options.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, AnyresConfig) and config.image_token_id is not None
        require_steps(raw, "do_resize")
        for field in ("size", "crop_size") if raw.get("do_center_crop", True) else ("size",):
            _require_side(raw, field, vision.crops.image_size)
        require_pinpoints(raw, vision, PINPOINTS)
        return cls(vision, config.image_token_id, raw.get("resample", 3))

    def check(self, size: tuple[int, int]) -> int:
        return self.vision.rows(size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The number of crops, and of tiles in a column and in a row, of an image of ``(width, height)``."""
        down, along = self.vision.tiles(size)
        return 1 + down * along, down, along

    def prepare(self, image: Image.Image) -> PreparedMedia:
        grid = self.grid(image.size)
        pixels = whole_and_tiles(image, self.vision.crops.image_size, grid[1:], self.resample)
        key = content_hash(pixels, family="llava_next", options={}, kind="image", size=image.size)
        return PreparedMedia(sized_item(self, image.size, key), pixels)


def _require_side(raw: Mapping[str, Any], field: str, side: int) -> None:
    """Refuse a size other than the tower's: squares are neither resized again nor cropped."""
    lengths = set(stated_size(raw, field).values()) or {_DEFAULT_SIDE if raw else side}
    if lengths != {side}:
        raise CheckpointError(
            f"preprocessor_config.json: {field} should be the tower's {side} pixels, not {raw.get(field)!r}",
            param=field,
        )
