"""Decodes videos in processes that may be killed."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.errors import MediaError, MediaTooLarge, Overloaded, Unavailable
from engine.media.video.limits import VideoLimits
from engine.media.video.video import VideoInfo

_START_SECONDS = 60.0
#: Bytes of frames that are handed over at a time.
_BATCH = 64 << 20
#: Address space of a process beside the frames of one batch: libraries, reference frames, buffers.
_MEMORY = 2 << 30


class VideoDecoder:
    """A small pool of processes, started when first needed and replaced when they die. Thread-safe.

    Args:
        limits: the longest video that is decoded.
        processes: videos decoded at a time.
        queue_limit: seconds to wait for a free process.
    """

    def __init__(self, limits: VideoLimits, *, processes: int = 4, queue_limit: float = 30.0) -> None:
        self.limits = limits
        self._queue_limit = queue_limit
        # Last in, first out: a second process starts only when two videos come at once.
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)
        self._count = processes

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
        process = self._take()
        try:
            if process is None:
                process = _Process()
            yield OpenVideo(process, data, where, self.limits)
        finally:
            if process is not None and process.is_dead:
                process.kill()
                process = None
            self._idle.put(process)

    def close(self) -> None:
        """End the processes; videos that are being decoded are waited for."""
        for _ in range(self._count):
            process = self._idle.get()
            if process is not None:
                process.kill()
        for _ in range(self._count):
            self._idle.put(None)

    def _take(self) -> _Process | None:
        try:
            return self._idle.get(timeout=self._queue_limit)
        except queue.Empty:
            raise Overloaded("Too many videos are being decoded; try again later.") from None


class OpenVideo:
    """A video file that a process has opened.

    Attributes:
        info: its description.
    """

    def __init__(self, process: _Process, data: bytes, where: str, limits: VideoLimits) -> None:
        self._process, self._where, self._limits = process, where, limits
        self._seconds = limits.decode_seconds
        file = os.memfd_create("video")
        try:
            with os.fdopen(os.dup(file), "wb") as writer:
                writer.write(data)
            os.lseek(file, 0, os.SEEK_SET)
            answer, _ = self._ask({"open": limits.max_source_frames}, file)
        finally:
            os.close(file)
        self.info = VideoInfo(answer["frames"], answer["fps"], tuple(answer["size"]))
        self._check()

    @property
    def process_id(self) -> int:
        """The process that decodes this video."""
        return self._process.process_id

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield upright RGB frames as they are decoded, one for each index; see ``VideoFile.frames``.

        Raises:
            MediaError: as :meth:`VideoDecoder.open`.
        """
        self._ask({"indices": list(indices)})
        left, size = len(indices), self.info.size
        while left:
            answer, file = self._ask({"take": _BATCH})
            if answer["count"] == 0 or file is None:
                raise self._error("it is damaged")
            try:
                if (answer["width"], answer["height"]) != size:
                    raise self._error("its frames change in size")
                shape = answer["count"], answer["height"], answer["width"], 3
                with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as mapped:
                    for frame in np.frombuffer(mapped, np.uint8).reshape(shape).copy():
                        yield Image.fromarray(frame)
            finally:
                os.close(file)
            left -= answer["count"]

    def _ask(self, request: dict[str, Any], file: int | None = None) -> tuple[dict[str, Any], int | None]:
        started = time.monotonic()
        found = self._process.ask(request, file, self._seconds)
        self._seconds -= time.monotonic() - started
        if found is None:
            raise self._error(
                f"it takes more than {self._limits.decode_seconds:g} seconds or more memory than allowed to "
                "decode; send a shorter or smaller one"
            )
        if "error" in found[0]:
            raise self._error(found[0]["error"])
        return found

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


class _Process:
    def __init__(self) -> None:
        script = Path(__file__).with_name("process.py")
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", str(script), str(_MEMORY)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.process_id = self._popen.pid
        self.is_dead = False
        if self.ask({"take": 0}, None, _START_SECONDS) is None:
            self.kill()
            raise Unavailable("The process that decodes videos could not be started.")

    def ask(
        self, request: dict[str, Any], file: int | None, seconds: float
    ) -> tuple[dict[str, Any], int | None] | None:
        """The answer, with the file that comes with it; None if the process died or was too slow."""
        deadline, data, files = time.monotonic() + seconds, b"", []
        try:
            message = json.dumps(request).encode() + b"\n"
            # The file goes with the last byte, so that it comes with the line's end.
            self._socket.sendall(message[:-1])
            socket.send_fds(self._socket, [message[-1:]], [] if file is None else [file])
            while not data.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                    raise TimeoutError
                piece, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
                files += descriptors
                if not piece:
                    raise ConnectionError
                data += piece
        except OSError:
            self.is_dead = True
            for descriptor in files:
                os.close(descriptor)
            return None
        return json.loads(data), files[0] if files else None

    def kill(self) -> None:
        self._socket.close()
        self._popen.kill()
        self._popen.wait()
