"""Decodes videos in processes that may be killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from engine.errors import MediaError, MediaTooLarge, Unavailable
from engine.helpers.files import file_of, taken
from engine.helpers.pool import Helper, HelperPool, Task
from engine.media.video.limits import VideoLimits
from engine.media.video.video import VideoInfo

#: Bytes of frames that are handed over at a time.
_BATCH = 64 << 20
#: Address space of a process beside the frames of one batch: libraries, reference frames, buffers.
_MEMORY = 2 << 30


class VideoDecoder:
    """Decodes videos in a small pool of processes. Thread-safe.

    Args:
        limits: the longest video that is decoded.
        processes: videos decoded at a time.
        queue_limit: seconds to wait for a free process.
    """

    def __init__(self, limits: VideoLimits, *, processes: int = 4, queue_limit: float = 30.0) -> None:
        self.limits = limits
        self._pool = HelperPool(
            _start,
            processes,
            busy="Too many videos are being decoded; try again later.",
            queue_limit=queue_limit,
        )

    @contextlib.contextmanager
    def open(self, data: bytes, where: str) -> Iterator[OpenVideo]:
        """Open a video file; only its packets are read.

        Args:
            data: the file's bytes.
            where: the field of the request, for errors.

        Raises:
            MediaError: the file can't be read, or not within the limits.
            Overloaded: all processes are busy with other videos.
            Unavailable: no process can be started.
        """
        if find_spec("av") is None:
            raise Unavailable("This server reads no video files: its package av is not installed.")
        with self._pool.helper() as helper:
            yield OpenVideo(helper, data, where, self.limits)

    def close(self) -> None:
        """End the processes; videos that are being decoded are waited for."""
        self._pool.close()


def _start() -> Helper:
    return Helper(Path(__file__).with_name("process.py"), {"memory": _MEMORY}, "decodes videos")


class OpenVideo:
    """A video file that a process has opened.

    Attributes:
        info: its description.
        process_id: of the process that decodes it.
    """

    def __init__(self, helper: Helper, data: bytes, where: str, limits: VideoLimits) -> None:
        self._where, self._limits = where, limits
        self.process_id = helper.process_id
        exhausted = (
            f"it takes more than {limits.decode_seconds:g} seconds or more memory than allowed to decode; "
            "send a shorter or smaller one"
        )
        self._task = Task(helper, limits.decode_seconds, self._error, exhausted)
        with file_of(data) as file:
            answer, _ = self._task.ask({"open": limits.max_source_frames}, file)
        self.info = VideoInfo(answer["frames"], answer["fps"], tuple(answer["size"]))
        self._check()

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield upright RGB frames as they are decoded, one for each index; see ``VideoFile.frames``.

        Raises:
            MediaError: as :meth:`VideoDecoder.open`.
        """
        self._task.ask({"indices": list(indices)})
        left, size = len(indices), self.info.size
        while left:
            answer, file = self._task.ask({"take": _BATCH})
            if answer["count"] == 0 or file is None:
                raise self._error("it is damaged")
            frames = taken(file, (answer["count"], answer["height"], answer["width"], 3))
            if (answer["width"], answer["height"]) != size:
                raise self._error("it has frames that change in size")
            for frame in frames:
                yield Image.fromarray(frame)
            left -= answer["count"]

    def _check(self) -> None:
        (width, height), limits = self.info.size, self._limits
        if width * height > limits.max_pixels:
            raise MediaTooLarge(
                f"{self._where}: the video's frames have {width} x {height} pixels; {limits.max_pixels} "
                "pixels are allowed.",
                param=self._where,
            )
        if self.info.duration > limits.max_seconds:
            raise MediaTooLarge(
                f"{self._where}: the video is {self.info.duration:.0f} seconds long; "
                f"{limits.max_seconds:g} are allowed.",
                param=self._where,
            )

    def _error(self, why: str) -> MediaError:
        return MediaError(f"{self._where}: the video can't be read: {why}.", param=self._where)
