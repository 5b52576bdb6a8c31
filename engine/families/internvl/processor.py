"""InternVL's images and videos: squares of the tower's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.families.base import ModelConfig
from engine.families.parsing.processor import require_same_colours, require_steps
from engine.families.tiles import TiledImages, require_side
from engine.media.keys import content_hash
from engine.media.resize import resize
from engine.media.video.sampling import FrameRules, middle_indices
from engine.media.video.video import Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION

_USUAL_FRAMES = 8
"""Frames of video files where the checkpoint states none, as in the public models' examples."""
_USUAL_RULES = FrameRules(num_frames=_USUAL_FRAMES)


@dataclass(frozen=True, slots=True)
class InternVLProcessor(TiledImages):
    """See :class:`engine.families.base.MediaProcessor`. A video's grid has its frames, 0 and 0.

    Attributes:
        video_resample: PIL's filter number for videos.
        frames: which frames of a video file are shown.
    """

    family: ClassVar[str] = "internvl"

    video_resample: int = 3
    frames: FrameRules = _USUAL_RULES

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
        # Transformers' whole processor asks for tiles, whatever the image processor's file states.
        return cls.of_tower(
            config,
            raw,
            options,
            resample=raw.get("resample", 3),
            video_resample=videos.get("resample", 3),
            frames=FrameRules(num_frames=videos.get("num_frames") or _USUAL_FRAMES),
        )

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        return middle_indices(info, self.frames, asked)

    def check_video(self, size: tuple[int, int], count: int) -> int:
        return count * self.rows

    def prepare_video(self, video: Video) -> PreparedMedia:
        square = self.side, self.side
        pixels = np.stack([resize(frame, square, self.video_resample) for frame in video.frames])
        key = content_hash(pixels, family=self.family, options=self._options, kind="video", size=video.size)
        rows, grid = self.check_video(video.size, video.count), (video.count, 0, 0)
        item = MediaItem.of_rows("video", key, self.image_token_id, rows, grid=grid, size=video.size)
        return PreparedMedia(item, pixels)
