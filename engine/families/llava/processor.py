"""LLaVA's images: the centre square of each, at the tower's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import ModelConfig
from engine.families.parsing.processor import require_steps
from engine.media.image_ops import check_aspect_ratio, resize
from engine.media.keys import content_hash
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.crops_config import CropVisionConfig

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class LlavaProcessor:
    """Resizes the shorter side to ``side`` pixels and cuts out the centre square.

    See :class:`engine.families.base.MediaProcessor`.

    Attributes:
        side: of the square, in pixels.
        rows: embedding rows per image.
        image_token_id: the token that rows replace.
        resample: PIL's filter number.
    """

    side: int
    rows: int
    image_token_id: int
    resample: int = 3

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> LlavaProcessor:
        """The checkpoint's processor; it has no options."""
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        side = vision.image_size
        require_steps(raw, "do_resize", "do_center_crop", "do_rescale", "do_normalize")
        size, crop = raw.get("size", side), raw.get("crop_size", side)
        if isinstance(size, Mapping):
            size = size.get("shortest_edge")
        if isinstance(crop, Mapping):
            crop = crop.get("height") if crop.get("height") == crop.get("width") else None
        if size != side or crop != side:
            raise CheckpointError(
                f"preprocessor_config.json: size and crop_size should both be the tower's {side} pixels",
                param="size",
            )
        return cls(side, vision.rows_per_crop, config.image_token_id, raw.get("resample", 3))

    def check(self, size: tuple[int, int]) -> int:
        check_aspect_ratio(size)
        return self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        self.check(image.size)
        short, long = min(image.size), max(image.size)
        longer = int(self.side * long / short)
        wide = image.width > image.height
        target = (longer, self.side) if wide else (self.side, longer)
        resized = resize(image, target, self.resample)
        offset = (longer - self.side) // 2
        centre = slice(offset, offset + self.side)
        pixels = np.ascontiguousarray(resized[:, centre] if wide else resized[centre])[None]
        options = {"side": self.side, "rows": self.rows}
        key = content_hash(pixels, family="llava", options=options, kind="image", size=image.size)
        return PreparedMedia(self._item(key, image.size), pixels)

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        raise InvalidRequest("this model takes images, not videos", param="video")

    @property
    def embedding_field(self) -> None:
        return None

    def embedding_item(self, description: tuple[int, ...], key: str) -> MediaItem:
        return self._item(key, (self.side, self.side))

    def _item(self, key: str, size: tuple[int, int]) -> MediaItem:
        return MediaItem.of_rows("image", key, self.image_token_id, self.rows, grid=(1,), size=size)
