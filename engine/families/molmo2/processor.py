"""Molmo 2's images, as a whole and in crops that overlap, and frames of videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, SizedImages, sized_item
from engine.families.molmo2.config import MolmoVisionConfig
from engine.families.parsing.processor import count_option, lowered, request_options
from engine.families.tiles import tilings
from engine.media.bilinear import resize_bilinear
from engine.media.image_ops import rgb_array
from engine.media.keys import content_hash
from engine.media.video.sampling import FrameRules, molmo2_indices
from engine.media.video.video import Pace, Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem, PreparedMedia

if TYPE_CHECKING:
    from PIL import Image

_BILINEAR = 2
#: Most frames of a video file and frames per second, where the video processor's JSON states none.
_USUAL_FRAMES, _USUAL_RATE = 64, 2
_DEFAULT_CROPS = 8
_MOST_CROPS = 64


@dataclass(frozen=True, slots=True)
class Molmo2Processor(SizedImages):
    """See :class:`engine.families.base.MediaProcessor`. Pixels are patches, crop by crop or frame by frame.

    Attributes:
        vision: the encoder's configuration.
        image_token_id: the token that rows replace.
        most_crops: most crops of an image, beside the whole of it.
        frames: the number of frames of a video file, and the highest rate.
    """

    vision: MolmoVisionConfig
    image_token_id: int
    most_crops: int
    frames: FrameRules

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> Molmo2Processor:
        """The checkpoint's processor with the option ``max_crops``.

        Raises:
            CheckpointError: naming the field that is not supported.
            ConfigError: naming the option that is out of bounds.
        """
        raw = checkpoint.preprocessor_config
        assert isinstance(config.vision, MolmoVisionConfig) and config.image_token_id is not None
        if raw.get("resample", _BILINEAR) != _BILINEAR:
            raise CheckpointError(
                f"preprocessor_config.json: resample should be {_BILINEAR} (bilinear)", param="resample"
            )
        most = count_option(options, "max_crops", raw.get("max_crops", _DEFAULT_CROPS), _MOST_CROPS)
        videos = checkpoint.video_preprocessor_config
        frames = FrameRules(
            fps=videos.get("max_fps", _USUAL_RATE), num_frames=videos.get("num_frames") or _USUAL_FRAMES
        )
        return cls(config.vision, config.image_token_id, most, frames)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the crops of an image of ``(width, height)`` pixels.

        They are those that enlarge the image least or, if all would shrink it, shrink it least. Sizes are
        compared in float32, without the margins.
        """
        vision = self.vision
        found = tilings(1, self.most_crops)
        margins = sum(vision.margins) * vision.patch_size
        sides = np.array([size[1] - margins, size[0] - margins], np.float32)
        with np.errstate(divide="ignore"):
            scales = ((np.array(found) * (vision.step * vision.patch_size)).astype(np.float32) / sides).min(1)
        if (scales < 1).all():
            return found[int(scales.argmax())]
        return found[int(np.where(scales < 1, np.float32(10e9), scales).argmin())]

    def check(self, size: tuple[int, int]) -> int:
        return self.vision.rows(self.grid(size))

    def prepare(self, image: Image.Image) -> PreparedMedia:
        vision, grid = self.vision, self.grid(image.size)
        pixels = rgb_array(image)
        whole = self._cut(pixels, (vision.side, vision.side), (1, 1))
        patches = np.concatenate([whole, self._cut(pixels, vision.canvas(grid), grid)])
        options = {"grid": list(grid)}
        key = content_hash(patches, family="molmo2", options=options, kind="image", size=image.size)
        return PreparedMedia(sized_item(self, image.size, key), patches)

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        return molmo2_indices(info, self.frames, asked)

    def check_video(self, size: tuple[int, int], count: int) -> int:
        return self.vision.rows((count,))

    def prepare_video(self, video: Video) -> PreparedMedia:
        side = self.vision.side
        patches = np.concatenate(
            [self._cut(rgb_array(frame), (side, side), (1, 1)) for frame in video.frames]
        )
        pace = video.pace or Pace.of_rate(video.count, self.frames.fps or _USUAL_RATE)
        times = pace.times
        if pace.duration is not None:
            # Of a file, whose frames Transformers chooses, it divides in float32.
            times = tuple(np.array(times, np.float32).tolist())
        grid = (video.count,)
        key = content_hash(patches, family="molmo2", options={"times": times}, kind="video", size=video.size)
        item = MediaItem.of_rows(
            "video", key, self.image_token_id, self.vision.rows(grid), grid=grid, size=video.size, times=times
        )
        return PreparedMedia(item, patches)

    def with_options(self, options: Mapping[str, Any]) -> Molmo2Processor:
        """See :class:`engine.families.base.AdjustableProcessor`."""
        options = request_options(options, "max_crops")
        return replace(self, most_crops=lowered(options, "max_crops", self.most_crops))

    def low_detail(self) -> Molmo2Processor:
        """See :class:`engine.families.base.AdjustableProcessor`."""
        return replace(self, most_crops=1)

    def _cut(self, pixels: np.ndarray, canvas: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
        """Resize an image to ``canvas`` (height and width in patches), and cut it into the patches of the
        crops of ``grid``: uint8 ``(N, patch², 3)``, crop by crop."""
        vision = self.vision
        patch, side = vision.patch_size, vision.side
        height, width = canvas
        resized = resize_bilinear(pixels, (width * patch, height * patch))
        patches = resized.reshape(height, patch, width, patch, 3).swapaxes(1, 2)
        crops = [
            patches[down * vision.step :, along * vision.step :][:side, :side]
            for down in range(grid[0])
            for along in range(grid[1])
        ]
        return np.stack(crops).reshape(-1, patch * patch, 3)
