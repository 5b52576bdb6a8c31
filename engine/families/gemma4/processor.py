"""Gemma 4's images and frames: resized to whole squares of patches, as many as a budget of rows allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import ModelConfig, SizedImages, sized_item
from engine.families.gemma4.config import SquareRowsConfig
from engine.families.parsing.processor import (
    count_option,
    lowered,
    parse_normalisation,
    request_options,
    require_steps,
)
from engine.media.keys import content_hash
from engine.media.resize import resize
from engine.media.video.sampling import FrameRules, uniform_indices
from engine.media.video.video import Pace, Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.normalisation import Normalisation

if TYPE_CHECKING:
    from PIL import Image

#: Rows of an image, and of a frame, at the most. The models were trained with 70, 140, 280, 560 and 1120.
_OF_IMAGES, _OF_FRAMES = 280, 70
_LOW, _MOST = 70, 1120
_USUAL_FRAMES = 32
#: Frames per second of a list of frames that come without times, as in Transformers.
_USUAL_RATE = 24.0
_OPTION = "max_soft_tokens"
_UNCHANGED = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def stated_normalisation(stated: Mapping[str, Any], *, normalises: bool) -> Normalisation:
    """Normalisation of bytes that an image or video processor's JSON states.

    Args:
        normalises: whether it uses its mean and deviation where it doesn't say.
    """
    return parse_normalisation({"do_normalize": normalises, **stated}, _UNCHANGED)


def centred(found: Normalisation) -> Normalisation:
    """``found``, and what Gemma 4's tower does behind it: ``2 * (pixel - 0.5)``."""
    mean = tuple(mean + 0.5 * std for mean, std in zip(found.mean, found.std, strict=True))
    return Normalisation(mean, tuple(0.5 * std for std in found.std), found.scale)


@dataclass(frozen=True, slots=True)
class Gemma4Processor(SizedImages):
    """See :class:`engine.families.base.MediaProcessor`. Pixels are patches; grids are
    ``(frames, height, width)`` in patches.

    Attributes:
        patch: side of a patch in pixels.
        side: side, in patches, of the square that becomes one row.
        image_token_id: the token that rows of images replace.
        video_token_id: the same for videos; None if the model has none.
        rows, frame_rows: most rows of an image and of a frame.
        resample, frame_resample: PIL's filter numbers.
        frames: the number of frames of a video file.
    """

    patch: int
    side: int
    image_token_id: int
    video_token_id: int | None
    rows: int
    frame_rows: int
    resample: int
    frame_resample: int
    frames: FrameRules

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> Gemma4Processor:
        """The checkpoint's processor with the option ``max_soft_tokens``, which counts for frames, too.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the encoder.
            ConfigError: naming the option that is out of bounds.
        """
        vision, images = config.vision, checkpoint.preprocessor_config
        videos = checkpoint.video_preprocessor_config
        assert isinstance(vision, SquareRowsConfig) and config.image_token_id is not None
        for file, raw in (("preprocessor_config.json", images), ("video_preprocessor_config.json", videos)):
            require_steps(raw, "do_resize")
            wanted = {"patch_size": (16, vision.patch_size), "pooling_kernel_size": (3, vision.side)}
            for field, (usual, value) in wanted.items():
                if (found := raw.get(field, usual)) != value:
                    raise CheckpointError(
                        f"{file}: {field} should be the encoder's {value}, not {found!r}", param=field
                    )
        if stated_normalisation(videos, normalises=True) != stated_normalisation(images, normalises=False):
            raise CheckpointError(
                "video_preprocessor_config.json: image_mean differs from the one for images",
                param="image_mean",
            )
        return cls(
            patch=vision.patch_size,
            side=vision.side,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            rows=count_option(options, _OPTION, images.get(_OPTION, _OF_IMAGES), _MOST),
            frame_rows=count_option(options, _OPTION, videos.get(_OPTION, _OF_FRAMES), _MOST),
            resample=images.get("resample", 3),
            frame_resample=videos.get("resample", 3),
            frames=FrameRules(fps=videos.get("fps"), num_frames=videos.get("num_frames") or _USUAL_FRAMES),
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of an image of ``(width, height)`` pixels."""
        return 1, *self._squares(size, self.rows)

    def check(self, size: tuple[int, int]) -> int:
        _, height, width = self.grid(size)
        return height * width // self.side**2

    def prepare(self, image: Image.Image) -> PreparedMedia:
        grid = self.grid(image.size)
        patches = self._cut(image, grid[1:], self.resample)
        key = self._key("image", patches, grid, image.size)
        return PreparedMedia(sized_item(self, image.size, key), patches)

    def with_options(self, options: Mapping[str, Any]) -> Gemma4Processor:
        rows = lowered(request_options(options, _OPTION), _OPTION, self.rows)
        return replace(self, rows=rows, frame_rows=min(rows, self.frame_rows))

    def low_detail(self) -> Gemma4Processor:
        return replace(self, rows=min(self.rows, _LOW), frame_rows=min(self.frame_rows, _LOW))

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        return uniform_indices(info, self.frames, asked)

    def check_video(self, size: tuple[int, int], count: int) -> int:
        height, width = self._squares(size, self.frame_rows)
        return count * (height * width // self.side**2)

    def prepare_video(self, video: Video) -> PreparedMedia:
        if self.video_token_id is None:
            raise InvalidRequest(
                "this model takes images, not videos: send a video's frames as images", param="video"
            )
        height, width = self._squares(video.size, self.frame_rows)
        frames = [self._cut(frame, (height, width), self.frame_resample) for frame in video.frames]
        patches, grid = np.concatenate(frames), (video.count, height, width)
        times = (video.pace or Pace.of_rate(video.count, _USUAL_RATE)).times
        key = self._key("video", patches, (*grid, *times), video.size)
        rows = self.check_video(video.size, video.count)
        item = MediaItem.of_rows(
            "video", key, self.video_token_id, rows, grid=grid, size=video.size, times=tuple(times)
        )
        return PreparedMedia(item, patches)

    def _squares(self, size: tuple[int, int], rows: int) -> tuple[int, int]:
        """Height and width, in patches, of an image of ``(width, height)`` pixels: whole squares, nearly as
        many as ``rows``; as Transformers' ``get_aspect_ratio_preserving_size``."""
        width, height = size
        unit = self.side * self.patch
        # The steps of this product decide about rounding.
        factor = math.sqrt(rows * self.side**2 * self.patch**2 / (height * width))
        down, along = (math.floor(factor * length / unit) for length in (height, width))
        if not down and not along:
            raise InvalidRequest(f"an image of {width}x{height} pixels is too small", param="image")
        if not down:
            down, along = 1, min(width // height, rows)
        elif not along:
            down, along = min(height // width, rows), 1
        return down * self.side, along * self.side

    def _cut(self, image: Image.Image, grid: tuple[int, int], resample: int) -> np.ndarray:
        """Resize an image and cut it into patches in the encoder's order: uint8 ``(N, patch², 3)``."""
        (height, width), side, patch = grid, self.side, self.patch
        pixels = resize(image, (width * patch, height * patch), resample)
        split = pixels.reshape(height // side, side, patch, width // side, side, patch, 3)
        return split.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch**2, 3)

    def _key(self, kind: str, patches: np.ndarray, shape: tuple[float, ...], size: tuple[int, int]) -> str:
        options = {"shape": list(shape)}
        return content_hash(patches, family="gemma4", options=options, kind=kind, size=size)
