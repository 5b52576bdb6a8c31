"""Idefics3's images: square crops of an enlarged image, and the whole of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import ModelConfig, SizedImages
from engine.families.parsing.processor import (
    bad_option,
    flag_option,
    lowered_flag,
    request_options,
    require_steps,
    stated_size,
)
from engine.media.image_ops import rgb_array
from engine.media.keys import content_hash
from engine.media.padding import cut_in_tiles
from engine.media.resize import resize, resized
from engine.media.video.video import Video
from engine.prompt import PreparedMedia
from engine.vision.crops_config import CropVisionConfig

if TYPE_CHECKING:
    from PIL import Image

_MAX_EDGE = 4096
#: Longer side of an image where the file states none, whatever the tower's size.
DEFAULT_EDGE = 4 * 364


@dataclass(frozen=True, slots=True)
class Idefics3Processor(SizedImages):
    """See :class:`engine.families.base.MediaProcessor`.

    Grids are ``(crops, rows, columns)``: the crops row by row, then the whole image as one more; an image
    that isn't split has 1 crop, 0 rows and 0 columns.

    Attributes:
        side: of a crop, in pixels.
        rows: embedding rows per crop.
        image_token_id: the token that rows replace.
        longest: pixels of an image's longer side after the first resizing.
        split: whether images are cut into crops.
        resample: PIL's filter number.
    """

    side: int
    rows: int
    image_token_id: int
    longest: int
    split: bool = True
    resample: int = 1

    @classmethod
    def create(cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]) -> Self:
        """The checkpoint's processor with the options ``do_image_splitting`` and ``size``."""
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        require_steps(raw, "do_resize")
        crop = stated_size(raw, "max_image_size").get("longest_edge", vision.image_size)
        if crop != vision.image_size:
            raise CheckpointError(
                f"preprocessor_config.json: max_image_size {crop} differs from the tower's "
                f"{vision.image_size} pixels",
                param="max_image_size",
            )
        split = flag_option(options, "do_image_splitting", raw.get("do_image_splitting", True))
        size = options.get(
            "size", {"longest_edge": longest_edge("preprocessor_config.json", stated_size(raw))}
        )
        if "size" in options and not _is_edge(size):
            raise bad_option("size", size, f'{{"longest_edge": 1 to {_MAX_EDGE}}}')
        rows, edge, resample = vision.rows_per_crop, size["longest_edge"], raw.get("resample", 1)
        return cls(crop, rows, config.image_token_id, edge, split, resample)

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of an image of ``(width, height)`` pixels."""
        width, height = self._whole_crops(self._bounded(size))
        rows, columns = height // self.side, width // self.side
        return (rows * columns + 1, rows, columns) if self.split and rows * columns > 1 else (1, 0, 0)

    def check(self, size: tuple[int, int]) -> int:
        return self.grid(size)[0] * self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        crops, rows, _ = self.grid(image.size)
        whole = resized(image, self._bounded(image.size), self.resample)
        if self.split:
            whole = resized(whole, self._whole_crops(whole.size), self.resample)
        pixels = np.empty((crops, self.side, self.side, 3), np.uint8)
        if rows:
            cut_in_tiles(rgb_array(whole), self.side, out=pixels[:-1])
        pixels[-1] = resize(whole, (self.side, self.side), self.resample)
        options = {"rows": self.rows}
        key = content_hash(pixels, family="idefics3", options=options, kind="image", size=image.size)
        return PreparedMedia(self.embedding_item(image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        options = request_options(options, "do_image_splitting")
        return replace(self, split=lowered_flag(options, "do_image_splitting", self.split))

    def low_detail(self) -> Self:
        return replace(self, split=False)

    def prepare_video(self, video: Video) -> PreparedMedia:
        raise InvalidRequest(
            "this model takes a video as images: send its frames as images, with do_image_splitting false",
            param="video",
        )

    def _bounded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The longer side at ``longest`` pixels, the other near the aspect ratio and even."""
        width, height = size
        if width >= height:
            short = int(self.longest / (width / height))
            size = self.longest, max(short + short % 2, 1)
        else:
            short = int(self.longest * (width / height))
            size = max(short + short % 2, 1), self.longest
        return _shrunk(size)

    def _whole_crops(self, size: tuple[int, int]) -> tuple[int, int]:
        """The longer side grown to whole crops, the other by the same factor and then to whole crops too."""
        width, height = size
        ratio = width / height
        if width >= height:
            width = self._crops(width)
            return width, self._crops(int(width / ratio))
        height = self._crops(height)
        return self._crops(int(height * ratio)), height

    def _crops(self, length: int) -> int:
        return math.ceil(length / self.side) * self.side


def _shrunk(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` with its longer side at most ``_MAX_EDGE``."""
    width, height = size
    ratio = width / height
    if width >= height and width > _MAX_EDGE:
        return _MAX_EDGE, max(int(_MAX_EDGE / ratio), 1)
    if height > width and height > _MAX_EDGE:
        return max(int(_MAX_EDGE * ratio), 1), _MAX_EDGE
    return size


def longest_edge(file: str, size: Mapping[str, int]) -> int:
    """The longer side that a processor's ``size`` states, in pixels.

    Raises:
        CheckpointError: it states other sides.
    """
    if size.keys() - {"longest_edge"}:
        raise CheckpointError(f"{file}: size should be longest_edge alone, not {dict(size)}", param="size")
    return size.get("longest_edge", DEFAULT_EDGE)


def _is_edge(value: Any) -> bool:
    """True for ``{"longest_edge": n}`` with 1 <= n <= ``_MAX_EDGE``."""
    if not isinstance(value, Mapping) or value.keys() != {"longest_edge"}:
        return False
    edge = value["longest_edge"]
    return isinstance(edge, int) and not isinstance(edge, bool) and 1 <= edge <= _MAX_EDGE
