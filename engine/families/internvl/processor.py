"""InternVL's images and videos: squares of the tower's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, SizedImages, sized_item
from engine.families.parsing.processor import (
    count_option,
    flag_option,
    lowered,
    lowered_flag,
    request_options,
    require_same_colours,
    require_steps,
    stated_size,
)
from engine.media.keys import content_hash
from engine.media.padding import cut_in_tiles
from engine.media.resize import resize
from engine.media.video.sampling import DEFAULT_RULES, FrameRules, middle_indices
from engine.media.video.video import Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION

if TYPE_CHECKING:
    from PIL import Image

USUAL_FRAMES = 8
"""Frames of video files where the checkpoint states none, as in the public models' examples."""

_DEFAULT_SIDE = 384
"""Of Transformers' image and video processors, for files that state no size."""
_MAX_TILES = 40


@dataclass(frozen=True, slots=True)
class InternVLProcessor(SizedImages):
    """See :class:`engine.families.base.MediaProcessor`.

    Grids are ``(crops, rows, columns)``: the tiles row by row, then the whole image as one more; an image in
    one crop has 1, 0 and 0, a video its frames, 0 and 0.

    Attributes:
        side: of a crop, in pixels.
        rows: embedding rows per crop.
        image_token_id: the token that rows replace.
        min_tiles, max_tiles: bounds of the number of tiles.
        tiled: whether images are cut into tiles.
        resample: PIL's filter numbers for images and for videos.
        frames: the number of frames of a video file.
    """

    side: int
    rows: int
    image_token_id: int
    min_tiles: int = 1
    max_tiles: int = 12
    tiled: bool = True
    resample: tuple[int, int] = (3, 3)
    frames: FrameRules = DEFAULT_RULES

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> InternVLProcessor:
        """The checkpoint's processor with the options ``crop_to_patches`` and ``max_patches``.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
            ConfigError: naming the option that is out of bounds.
        """
        raw, videos, vision = (
            checkpoint.preprocessor_config,
            checkpoint.video_preprocessor_config,
            config.vision,
        )
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        for file, stated in (("preprocessor_config.json", raw), ("video_preprocessor_config.json", videos)):
            require_steps(stated, "do_resize")
            require_side(file, stated, vision.image_size)
        require_same_colours(videos, vision.normalisation, CLIP_NORMALISATION)
        made = cls.of_tower(config, raw, options)
        return replace(
            made,
            resample=(raw.get("resample", 3), videos.get("resample", 3)),
            frames=FrameRules(num_frames=videos.get("num_frames") or USUAL_FRAMES),
        )

    @classmethod
    def of_tower(
        cls, config: ModelConfig, limits: Mapping[str, Any], options: Mapping[str, Any]
    ) -> InternVLProcessor:
        """The processor of a model's tower; errors as :meth:`create`.

        Args:
            limits: the model's ``min_patches`` and ``max_patches``, 1 and 12 where they are missing.
        """
        vision = config.vision
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        # Transformers' whole processor asks for tiles, whatever the image processor's file states.
        tiled = flag_option(options, "crop_to_patches", True)
        most = count_option(options, "max_patches", limits.get("max_patches", 12), _MAX_TILES)
        return cls(
            vision.image_size,
            vision.rows_per_crop,
            config.image_token_id,
            limits.get("min_patches", 1),
            most,
            tiled,
            frames=FrameRules(num_frames=USUAL_FRAMES),
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of an image of ``(width, height)`` pixels."""
        if not self.tiled or self.max_tiles == 1:
            return 1, 0, 0
        columns, rows = best_tiling(size, self.side, self.min_tiles, self.max_tiles)
        return (columns * rows + 1, rows, columns) if columns * rows > 1 else (1, 0, 0)

    def check(self, size: tuple[int, int]) -> int:
        return self.grid(size)[0] * self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        pixels = cut_image(image, self.side, self.grid(image.size), self.resample[0])
        key = content_hash(pixels, family="internvl", options=self._options, kind="image", size=image.size)
        return PreparedMedia(sized_item(self, image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> InternVLProcessor:
        options = request_options(options, "crop_to_patches", "max_patches")
        return replace(
            self,
            tiled=lowered_flag(options, "crop_to_patches", self.tiled),
            max_tiles=lowered(options, "max_patches", self.max_tiles),
        )

    def low_detail(self) -> InternVLProcessor:
        return replace(self, tiled=False)

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        return middle_indices(info, self.frames, asked)

    def check_video(self, size: tuple[int, int], count: int) -> int:
        return count * self.rows

    def prepare_video(self, video: Video) -> PreparedMedia:
        square = self.side, self.side
        pixels = np.stack([resize(frame, square, self.resample[1]) for frame in video.frames])
        key = content_hash(pixels, family="internvl", options=self._options, kind="video", size=video.size)
        rows, grid = self.check_video(video.size, video.count), (video.count, 0, 0)
        item = MediaItem.of_rows("video", key, self.image_token_id, rows, grid=grid, size=video.size)
        return PreparedMedia(item, pixels)

    @property
    def _options(self) -> dict[str, Any]:
        return {"tiled": self.tiled, "tiles": (self.min_tiles, self.max_tiles)}


def cut_image(image: Image.Image, side: int, grid: tuple[int, int, int], resample: int) -> np.ndarray:
    """The tiles of an image, row by row, and the whole behind them: uint8 ``(crops, side, side, 3)``.

    Args:
        grid: ``(crops, rows, columns)``; an image in one crop has no tiles.
        resample: PIL's filter number.
    """
    crops, rows, columns = grid
    pixels = np.empty((crops, side, side, 3), np.uint8)
    pixels[-1] = resize(image, (side, side), resample)
    if crops > 1:
        cut_in_tiles(resize(image, (columns * side, rows * side), resample), side, out=pixels[:-1])
    return pixels


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
