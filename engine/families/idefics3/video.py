"""Videos of SmolVLM2: frames as whole images, each behind its time, and words about the video before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.families.base import ModelConfig
from engine.families.idefics3.processor import DEFAULT_EDGE, Idefics3Processor, longest_edge
from engine.families.parsing.processor import require_same_colours, require_steps, stated_size
from engine.media.keys import content_hash
from engine.media.resize import resize, resized
from engine.media.video.sampling import FrameRules, smolvlm_indices
from engine.media.video.video import Pace, Video, VideoInfo, VideoOptions, minutes_and_seconds
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import HALF_NORMALISATION

#: Frames per second of a list of frames that come without times, as in Transformers.
_USUAL_RATE = 24.0
_MAX_EDGE = 4096
_USUAL_FRAMES = FrameRules(fps=1.0, max_frames=64)
# fmt: off
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
# fmt: on
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True, slots=True)
class SmolVLMProcessor(Idefics3Processor):
    """An :class:`Idefics3Processor` that takes videos too.

    A video's grid is ``(frames, 0, 0)``; its times are those of the frames, and its duration last.

    Attributes:
        video_longest: pixels of a frame's longer side after the first resizing.
        video_resample: PIL's filter number for frames.
        frames: the rate and the most frames of a video file.
    """

    video_longest: int = DEFAULT_EDGE
    video_resample: int = 1
    frames: FrameRules = _USUAL_FRAMES

    @classmethod
    def create(cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]) -> Self:
        made = super(SmolVLMProcessor, cls).create(checkpoint, config, options)
        raw, vision = checkpoint.video_preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig)
        require_steps(raw, "do_resize")
        require_same_colours(raw, vision.normalisation, HALF_NORMALISATION)
        sampling = raw.get("video_sampling") or {}
        # Transformers lets the file's size decide where both are stated.
        size = stated_size(raw) or stated_size(sampling, "video_size")
        return replace(
            made,
            video_longest=min(longest_edge("video_preprocessor_config.json", size), _MAX_EDGE),
            video_resample=raw.get("resample", 1),
            frames=replace(
                _USUAL_FRAMES,
                **{name: sampling[name] for name in ("fps", "max_frames") if name in sampling},
            ),
        )

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        return smolvlm_indices(info, self.frames, asked)

    def check_video(self, size: tuple[int, int], count: int) -> int:
        return count * self.rows

    def prepare_video(self, video: Video) -> PreparedMedia:
        bounded = replace(self, longest=self.video_longest)._bounded(video.size)
        square = self.side, self.side
        wholes = (resized(frame, bounded, self.video_resample) for frame in video.frames)
        pixels = np.stack([resize(whole, square, self.video_resample) for whole in wholes])
        pace = video.pace or Pace.of_rate(video.count, _USUAL_RATE)
        times = *pace.times, pace.times[-1] if pace.duration is None else pace.duration
        options = {"rows": self.rows, "times": times}
        key = content_hash(pixels, family="idefics3", options=options, kind="video", size=video.size)
        item = MediaItem.of_rows(
            "video",
            key,
            self.image_token_id,
            self.check_video(video.size, video.count),
            grid=(video.count, 0, 0),
            size=video.size,
            times=times,
        )
        return PreparedMedia(item, pixels)


def words_around(item: MediaItem) -> tuple[str, str]:
    """The words before a video, up to its first frame, and the line feeds behind it."""
    *times, duration = item.times
    length = timedelta(seconds=int(duration))
    frames = number_in_words(len(times))
    intro = f"You are provided the following series of {frames} frames from a {length} [H:MM:SS] video.\n"
    return intro + words_of_frame(times[0]), "\n\n"


def words_of_frame(seconds: float) -> str:
    """The words before a frame."""
    return f"\nFrame from {minutes_and_seconds(seconds)}:"


def number_in_words(number: int) -> str:
    """A number below a million in British English, such as ``one thousand, two hundred and thirty-four``."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, units = _TENS[number // 10 - 2], number % 10
        return f"{tens}-{_UNITS[units]}" if units else tens
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    whole, rest = f"{number_in_words(number // size)} {name}", number % size
    if not rest:
        return whole
    return f"{whole}{' and' if rest < 100 else ','} {number_in_words(rest)}"
