"""Decodes videos in processes that may be killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from engine.errors import MediaTooLarge
from engine.helpers.files import taken
from engine.media.file_pool import FileKind, FilePool, OpenFile
from engine.media.video.limits import VideoLimits
from engine.media.video.video import VideoInfo

#: Bytes of frames that are handed over at a time.
_BATCH = 64 << 20
_KIND = FileKind(
    "video", Path(__file__).with_name("process.py"), "av", smaller="send a shorter or smaller one"
)


class VideoDecoder:
    """Decodes videos within ``limits``; other arguments as of :class:`~engine.media.file_pool.FilePool`."""

    def __init__(self, limits: VideoLimits, *, processes: int = 4, queue_limit: float = 30.0) -> None:
        self._limits = limits
        self._pool = FilePool(_KIND, limits.decode_seconds, processes=processes, queue_limit=queue_limit)

    @contextlib.contextmanager
    def open(self, data: bytes, where: str) -> Iterator[OpenVideo]:
        """Open a video file, as :meth:`~engine.media.file_pool.FilePool.open`; only its packets are read.

        Raises:
            MediaTooLarge: the video is not within the limits.
        """
        with self._pool.open(data, where, self._limits.max_source_frames) as file:
            yield OpenVideo(file, self._limits)

    def close(self) -> None:
        """End the processes; videos that are being decoded are waited for."""
        self._pool.close()


class OpenVideo:
    """A video file that a process has opened.

    Attributes:
        info: its description.
        process_id: of the process that decodes it.
    """

    def __init__(self, file: OpenFile, limits: VideoLimits) -> None:
        self._file, self.process_id = file, file.process_id
        opened = file.opened
        self.info = VideoInfo(opened["frames"], opened["fps"], tuple(opened["size"]))
        self._check(limits)

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield upright RGB frames as they are decoded, one for each index; see ``VideoFile.frames``.

        Raises:
            MediaError: as :meth:`~engine.media.file_pool.OpenFile.ask`.
        """
        self._file.ask({"indices": list(indices)})
        left, size = len(indices), self.info.size
        while left:
            answer, file = self._file.ask({"take": _BATCH})
            if answer["count"] == 0 or file is None:
                raise self._file.failed("it is damaged")
            frames = taken(file, (answer["count"], answer["height"], answer["width"], 3))
            if (answer["width"], answer["height"]) != size:
                raise self._file.failed("it has frames that change in size")
            for frame in frames:
                yield Image.fromarray(frame)
            left -= answer["count"]

    def _check(self, limits: VideoLimits) -> None:
        (width, height), where = self.info.size, self._file.where
        if width * height > limits.max_pixels:
            raise MediaTooLarge(
                f"{where}: the video's frames have {width} x {height} pixels; {limits.max_pixels} "
                "pixels are allowed.",
                param=where,
            )
        if self.info.duration > limits.max_seconds:
            raise MediaTooLarge(
                f"{where}: the video is {self.info.duration:.0f} seconds long; "
                f"{limits.max_seconds:g} are allowed.",
                param=where,
            )
