"""Videos as models' processors get them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The description of a video file.

    Attributes:
        frames: number of frames.
        fps: frames per second, on average.
        size: upright ``(width, height)`` in pixels.
    """

    frames: int
    fps: float
    size: tuple[int, int]

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return self.frames / self.fps


@dataclass(frozen=True, slots=True)
class Pace:
    """The times of a video's frames.

    Attributes:
        times: the second of each frame that the model is shown, from the video's first frame on.
        rate: frames per second that the model is shown, on average.
        duration: seconds of the whole video; None if only the shown frames are known.
    """

    times: tuple[float, ...]
    rate: float
    duration: float | None = None

    @classmethod
    def of_rate(cls, count: int, rate: float) -> Pace:
        """``count`` frames, ``rate`` of them a second."""
        return cls(tuple(index / rate for index in range(count)), rate)

    @classmethod
    def of_indices(cls, indices: Sequence[int], info: VideoInfo) -> Pace:
        """Chosen frames of a file, with the same arithmetic as Transformers' ``VideoMetadata``."""
        times = tuple(index / info.fps for index in indices)
        return cls(times, len(indices) / info.frames * info.fps, info.duration)

    @classmethod
    def of_times(cls, times: Sequence[float]) -> Pace:
        """Frames at given seconds; a lone frame lasts a second."""
        span = times[-1] - times[0]
        return cls(tuple(times), (len(times) - 1) / span if span > 0 else 1.0)


def minutes_and_seconds(seconds: float) -> str:
    """The time of a frame as models read it, ``mm:ss``, rounded down; an hour is 60 minutes."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


@dataclass(frozen=True, slots=True)
class Video:
    """The frames of a video that a model is shown.

    Attributes:
        size: their ``(width, height)`` in pixels.
        count: their number.
        frames: upright RGB images; may be read once.
        pace: their times; None if the caller doesn't tell.
    """

    size: tuple[int, int]
    count: int
    frames: Iterable[Image.Image]
    pace: Pace | None = None

    @classmethod
    def of(cls, frames: Sequence[Image.Image], pace: Pace | None = None) -> Video:
        """A video of decoded frames.

        Raises:
            InvalidRequest: there are none, or they differ in size.
        """
        if not frames or any(frame.size != frames[0].size for frame in frames):
            raise InvalidRequest("a video needs frames, all of the same size", param="video")
        return cls(frames[0].size, len(frames), frames, pace)


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """The frames of a video that a caller asks for.

    Attributes:
        fps: frames per second that the model is shown. Of a list of frames, their own rate.
        num_frames: number of frames of a file that the model is shown, instead of a rate.
        times: the second of each frame of a list, instead of a rate.
    """

    fps: float | None = None
    num_frames: int | None = None
    times: tuple[float, ...] = ()

    @property
    def is_set(self) -> bool:
        """True if the caller asks for anything."""
        return bool(self.fps or self.num_frames or self.times)


ANY_FRAMES = VideoOptions()
"""The caller asks for nothing: the model's own processor decides."""
