"""Gemma 3's images: resized to the tower's square, and with pan and scan also the parts of long ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import IMAGE_SIZES, EmbeddingField, ImagesOnly, ModelConfig, sized_item
from engine.families.parsing.processor import (
    bad_option,
    count_option,
    flag_option,
    lowered,
    lowered_flag,
    request_options,
    require_steps,
    stated_size,
)
from engine.media.keys import content_hash
from engine.media.resize import resize
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.crops_config import CropVisionConfig

if TYPE_CHECKING:
    from PIL import Image

_FILE = "preprocessor_config.json"
_DEFAULT_SIDE = 224
"""Of Transformers' image processor, for files that state no size."""
_DEFAULT_CROPS = 4
_MOST_CROPS = 64


@dataclass(frozen=True, slots=True)
class Gemma3Processor(ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`. Grids are ``(crops,)``: the image and its parts.

    Attributes:
        side: of a crop, in pixels.
        rows: embedding rows per crop.
        image_token_id: the token that rows replace.
        scanned: whether long images are shown in parts as well (pan and scan).
        most_parts: most parts of an image.
        least_side: fewest pixels along a side of a part.
        least_ratio: least ratio of an image's sides that has parts.
        resample: PIL's filter number.
    """

    side: int
    rows: int
    image_token_id: int
    scanned: bool = False
    most_parts: int = _DEFAULT_CROPS
    least_side: int = 256
    least_ratio: float = 1.2
    resample: int = 2

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> Gemma3Processor:
        """The checkpoint's processor with the options of pan and scan.

        Transformers' whole processor takes pan and scan from its caller alone: fields of the image
        processor's file count for nothing.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
            ConfigError: naming the option that is out of bounds.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        require_steps(raw, "do_resize")
        size = stated_size(raw) or dict.fromkeys(("height", "width"), _DEFAULT_SIDE)
        if size != {"height": vision.image_size, "width": vision.image_size}:
            raise CheckpointError(
                f"{_FILE}: size should be the tower's {vision.image_size} pixels, not {size}", param="size"
            )
        stated = checkpoint.json("processor_config.json").get("image_seq_length", 256)
        if stated != vision.rows_per_crop:
            raise CheckpointError(
                f"processor_config.json: image_seq_length {stated} differs from the model's "
                f"{vision.rows_per_crop} rows per image",
                param="image_seq_length",
            )
        scanned = flag_option(options, "do_pan_and_scan", False)
        ratio = options.get("pan_and_scan_min_ratio_to_activate", 1.2)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or ratio < 1:
            raise bad_option("pan_and_scan_min_ratio_to_activate", ratio, "a number of 1 or more")
        return cls(
            vision.image_size,
            vision.rows_per_crop,
            config.image_token_id,
            scanned,
            count_option(options, "pan_and_scan_max_num_crops", _DEFAULT_CROPS, _MOST_CROPS),
            count_option(options, "pan_and_scan_min_crop_size", 256, 1 << 16),
            ratio,
            raw.get("resample", 2),
        )

    def grid(self, size: tuple[int, int]) -> tuple[int]:
        """The grid of an image of ``(width, height)`` pixels."""
        return (1 + len(self._parts(size)),)

    def check(self, size: tuple[int, int]) -> int:
        return self.grid(size)[0] * self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        square = self.side, self.side
        crops = [image, *(image.crop(part) for part in self._parts(image.size))]
        pixels = np.stack([resize(crop, square, self.resample) for crop in crops])
        options = {"rows": self.rows}
        key = content_hash(pixels, family="gemma3", options=options, kind="image", size=image.size)
        return PreparedMedia(sized_item(self, image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> Gemma3Processor:
        """See :class:`engine.families.base.AdjustableProcessor`."""
        given = request_options(options, "do_pan_and_scan", "pan_and_scan_max_num_crops")
        return replace(
            self,
            scanned=lowered_flag(given, "do_pan_and_scan", self.scanned),
            most_parts=lowered(given, "pan_and_scan_max_num_crops", self.most_parts),
        )

    def low_detail(self) -> Gemma3Processor:
        """See :class:`engine.families.base.AdjustableProcessor`."""
        return replace(self, scanned=False)

    @property
    def embedding_field(self) -> EmbeddingField | None:
        return IMAGE_SIZES if self.scanned else None

    def embedding_item(self, description: tuple[int, ...], key: str) -> MediaItem:
        return sized_item(self, description or (self.side, self.side), key)

    def _parts(self, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of each part of an image of ``(width, height)`` pixels: a line of
        parts along its longer side, as Transformers' ``pan_and_scan`` chooses them."""
        width, height = size
        if not self.scanned or max(size) / min(size) < self.least_ratio:
            return []
        wanted = min(max(size) // self.least_side, math.floor(max(size) / min(size) + 0.5))
        count = min(self.most_parts, max(2, wanted))
        along = math.ceil(max(size) / count)
        if min(along, *size) < self.least_side:
            return []
        ends = [(along * part, min(along * (part + 1), max(size))) for part in range(count)]
        if width >= height:
            return [(start, 0, end, height) for start, end in ends]
        return [(0, start, width, end) for start, end in ends]
