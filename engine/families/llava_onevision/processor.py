"""LLaVA-OneVision's images and videos: crops of the tower's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, SizedImages, sized_item
from engine.families.parsing.anyres import require_pinpoints
from engine.families.parsing.processor import (
    mean_colour,
    request_options,
    require_same_colours,
    require_steps,
    stated_size,
)
from engine.media.keys import content_hash
from engine.media.padding import resize_in_square, whole_and_tiles
from engine.media.resize import resize
from engine.media.video.sampling import DEFAULT_RULES, FrameRules, uniform_indices
from engine.media.video.video import Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.anyres import AnyresConfig
from engine.vision.normalisation import CLIP_NORMALISATION

_SIDES = tuple(384 * tiles for tiles in range(1, 7))
PINPOINTS = tuple((height, width) for height in _SIDES for width in _SIDES)
"""The public models' tilings."""

USUAL_FRAMES = 32
"""Frames of video files where the checkpoint states none: the number that the model was trained with."""


@dataclass(frozen=True, slots=True)
class LlavaOnevisionProcessor(SizedImages):
    """See :class:`engine.families.base.MediaProcessor`; grids are those of
    :class:`engine.vision.anyres_encoder.AnyresVisionEncoder`.

    Attributes:
        vision: the tower and the tilings.
        image_token_id, video_token_id: the tokens that rows replace.
        background: colour of the padding of an image that isn't tiled.
        resample: PIL's filter numbers for images and for videos.
        frames: the number of frames of a video file.
        tiled: whether an image is shown in tiles as well; else in one crop, padded to a square.
    """

    vision: AnyresConfig
    image_token_id: int
    video_token_id: int
    background: tuple[int, ...]
    resample: tuple[int, int] = (3, 3)
    frames: FrameRules = DEFAULT_RULES
    tiled: bool = True

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> LlavaOnevisionProcessor:
        """The checkpoint's processor; it has no options."""
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, AnyresConfig)
        assert config.image_token_id is not None and config.video_token_id is not None
        side = vision.crops.image_size
        require_steps(raw, "do_resize")
        size = stated_size(raw)
        if {size.get(name, side) for name in ("height", "width", "shortest_edge")} != {side}:
            raise CheckpointError(
                f"preprocessor_config.json: size should be the tower's {side} pixels", param="size"
            )
        require_pinpoints(raw, vision, PINPOINTS)
        videos = checkpoint.video_preprocessor_config
        require_steps(videos, "do_resize")
        require_same_colours(videos, vision.crops.normalisation, CLIP_NORMALISATION)
        size = stated_size(videos)
        if {size.get(name, side) for name in ("height", "width")} != {side}:
            raise CheckpointError(
                f"video_preprocessor_config.json: size should be the tower's {side} pixels", param="size"
            )
        resample = raw.get("resample", 3), videos.get("resample", 3)
        frames = FrameRules(fps=videos.get("fps"), num_frames=videos.get("num_frames") or USUAL_FRAMES)
        colour = mean_colour(raw, CLIP_NORMALISATION)
        return cls(vision, config.image_token_id, config.video_token_id, colour, resample, frames)

    def among(self, num_images: int) -> LlavaOnevisionProcessor:
        """Only the single image of a prompt is shown in tiles."""
        return replace(self, tiled=num_images <= 1)

    def check(self, size: tuple[int, int]) -> int:
        return self.vision.rows(size) if self.tiled else self.vision.crops.rows_per_crop + 1

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Number of crops, and of tiles in a column and in a row, of an image of ``(width, height)``."""
        if not self.tiled:
            return 1, 0, 0
        down, along = self.vision.tiles(size)
        return 1 + down * along, down, along

    def prepare(self, image: Image.Image) -> PreparedMedia:
        side, filter = self.vision.crops.image_size, self.resample[0]
        if self.tiled:
            pixels = whole_and_tiles(image, side, self.grid(image.size)[1:], filter)
        else:
            pixels = resize_in_square(image, side, self.background, filter)[None]
        return PreparedMedia(sized_item(self, image.size, self._key("image", pixels, image.size)), pixels)

    def with_options(self, options: Mapping[str, Any]) -> LlavaOnevisionProcessor:
        request_options(options)
        return self

    def low_detail(self) -> LlavaOnevisionProcessor:
        """One crop, as an image among several is shown."""
        return self.among(2)

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        return uniform_indices(info, self.frames, asked)

    def check_video(self, size: tuple[int, int], count: int) -> int:
        return count * self._frame_rows + 1

    def prepare_video(self, video: Video) -> PreparedMedia:
        side = self.vision.crops.image_size
        pixels = np.stack([resize(frame, (side, side), self.resample[1]) for frame in video.frames])
        rows, key = self.check_video(video.size, video.count), self._key("video", pixels, video.size)
        grid = video.count, 0, 0
        item = MediaItem.of_rows("video", key, self.video_token_id, rows, grid=grid, size=video.size)
        return PreparedMedia(item, pixels)

    @property
    def _frame_rows(self) -> int:
        """Rows of one frame of a video, which is shrunk to half its height and width."""
        return (-(-self.vision.crops.grid_side // 2)) ** 2

    def _key(self, kind: str, pixels: np.ndarray, size: tuple[int, int]) -> str:
        options = {"tiled": self.tiled}
        return content_hash(pixels, family="llava_onevision", options=options, kind=kind, size=size)
