"""Reads frames of video files: their list first, then only those that are wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np

from engine.media.video.display import Display
from engine.media.video.video import VideoInfo

#: FFmpeg's demuxers that are used. Others, such as playlists, open further files or addresses.
_FORMATS = "mov,matroska,avi"
#: A seek takes the time of about this number of decoded frames.
_SEEK_COST = 8
#: Gaps between frames that differ by less than this share of their median are a constant rate.
_JITTER = 0.2
#: Gaps of fewer units of the time base than this are not rounded: a longer gap is a missing frame.
_COARSE = 3
#: Part of the time base's unit by which computed times may be off.
_ROUNDING = 1e-6
#: Frames per second of a file that states neither rate nor times.
_USUAL_RATE = 25.0


class UnreadableVideo(Exception):
    """The file is no video, or is damaged. The text says which, for the caller to read."""


class VideoFile:
    """The first video stream of an opened file; sound and further streams are not read.

    Args:
        file: a seekable binary file. The caller closes it.
        max_packets: most frames that the file may list.

    Raises:
        UnreadableVideo: there is no video stream, or it has no frames, or too many.
    """

    def __init__(self, file: BinaryIO, max_packets: int) -> None:
        self._file = file
        self._container, self._stream = _open(file)
        try:
            times, keys, regular, length = self._list_packets(max_packets)
        except av.FFmpegError as error:
            raise UnreadableVideo("it is damaged") from error
        if not times:
            raise UnreadableVideo("it has no frames")
        #: Presentation times of all frames, in the stream's time base; None if the file doesn't state them.
        self._times: list[int] | None = sorted(times) if regular else None
        self._keys = sorted(keys) if regular else []
        self._constant = self._times is None or _is_constant(self._times)
        self._display, size = self._first_frame()
        self.info = VideoInfo(len(times), self._rate(len(times), length), size)

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield uint8 RGB frames ``(height, width, 3)``, upright, one for each index.

        Index ``i`` means the frame that is shown ``i / fps`` seconds after the first one. At a constant rate
        that is the ``i``-th frame.

        Args:
            indices: ascending, from 0; an index may come several times.

        Raises:
            UnreadableVideo: no frame can be decoded.
        """
        try:
            shown = self._in_order(indices) if self._times is None else self._by_time(indices, self._times)
            for frame in shown:
                yield self._display.shown(frame.to_ndarray(format="rgb24"))
        except av.FFmpegError as error:
            raise UnreadableVideo("it is damaged") from error

    def close(self) -> None:
        self._container.close()

    def _list_packets(self, most: int) -> tuple[list[int], list[int], bool, int]:
        """Presentation times of all frames, those of key frames, whether each frame has a time of its own,
        and the duration of the frame that is shown last (0 if the file doesn't state it)."""
        times: list[int] = []
        keys: list[int] = []
        regular, last, length = True, -1, 0
        for packet in self._container.demux(self._stream):
            if packet.size == 0 or packet.is_discard:
                continue
            if len(times) == most:
                raise UnreadableVideo(f"it has more than {most} frames")
            regular = regular and packet.pts is not None
            times.append(packet.pts if packet.pts is not None else len(times))
            if times[-1] >= last:
                last, length = times[-1], packet.duration or 0
            if packet.is_keyframe:
                keys.append(times[-1])
        # AVI states when a frame is decoded, not when it is shown: with B frames these differ.
        told = self._container.format.name != "avi" or not self._stream.codec_context.has_b_frames
        return times, keys, regular and told and len(set(times)) == len(times), length

    def _first_frame(self) -> tuple[Display, tuple[int, int]]:
        """How frames are shown, and the size that they have then."""
        self._rewind()
        try:
            frame = next(self._container.decode(self._stream), None)
        except av.FFmpegError as error:
            raise UnreadableVideo("it is damaged") from error
        if frame is None:
            raise UnreadableVideo("it has no frames")
        display = Display.of(frame)
        size = (frame.height, frame.width) if display.turned else (frame.width, frame.height)
        return display, size

    def _rate(self, count: int, length: int) -> float:
        """Frames per second: the container's average, or the times' own average where these vary."""
        stated: Fraction | None = self._stream.average_rate
        if self._times is not None and count > 1 and not (stated and self._constant):
            shown = self._times[-1] - self._times[0]
            seconds = (shown + (length or shown / (count - 1))) * self._stream.time_base
            return float(count / seconds)
        return float(stated or self._stream.guessed_rate or _USUAL_RATE)

    def _by_time(self, indices: Sequence[int], times: list[int]) -> Iterator[Any]:
        """Frames by presentation time, with seeks over long gaps."""
        wanted = self._places(indices, times)
        decoded: Callable[[], Any] = self._rewind()
        frame, last = decoded(), None
        for place in wanted:
            target = times[place]
            key = self._keys[bisect_right(self._keys, target) - 1] if self._keys else target
            now = times[0] if frame is None or frame.pts is None else frame.pts
            if key > now and bisect_right(times, key) - bisect_right(times, now) > _SEEK_COST:
                decoded = self._seek(key)
                ahead = decoded()
                if ahead is None or ahead.pts is None or ahead.pts > target:
                    # The container's index leads past the frame: all frames up to there are decoded.
                    decoded = self._rewind()
                    ahead = decoded()
                frame = ahead
            while frame is not None and frame.pts is not None and frame.pts < target:
                last, frame = frame, decoded()
            # Behind the last frame that decodes, the last one stays on the screen.
            found = frame if frame is not None else last
            if found is None:
                raise UnreadableVideo("it is damaged")
            yield found

    def _places(self, indices: Sequence[int], times: list[int]) -> list[int]:
        """The frame of each index: itself at a constant rate, else the frame that is shown at its time."""
        if self._constant:
            return [min(index, len(times) - 1) for index in indices]
        ticks = 1 / (self.info.fps * float(self._stream.time_base))
        return [bisect_right(times, times[0] + index * ticks + _ROUNDING) - 1 for index in indices]

    def _in_order(self, indices: Sequence[int]) -> Iterator[Any]:
        """Frames in the decoder's order, for files whose packets have no times."""
        decoded = self._rewind()
        frame, place = decoded(), 0
        for index in indices:
            while place < index:
                following = decoded()
                if following is None:
                    break
                frame, place = following, place + 1
            if frame is None:
                raise UnreadableVideo("it is damaged")
            yield frame

    def _rewind(self) -> Callable[[], Any]:
        """Open the file again; the next frame, or None at the end, at each call.

        Seeking to 0 isn't enough: some demuxers then give frames before the first one, or none.
        """
        self._container.close()
        self._file.seek(0)
        self._container, self._stream = _open(self._file)
        return self._decoder()

    def _seek(self, time: int) -> Callable[[], Any]:
        self._container.seek(time, stream=self._stream, backward=True)
        return self._decoder()

    def _decoder(self) -> Callable[[], Any]:
        frames = self._container.decode(self._stream)
        return lambda: next(frames, None)


def _is_constant(times: list[int]) -> bool:
    """Return whether frames follow each other at one rate. Containers round times to their time base."""
    gaps = np.diff(np.array(times, dtype=np.float64))
    if len(gaps) == 0:
        return True
    usual = float(np.median(gaps))
    rounding = 1 if usual >= _COARSE else 0
    return float(np.abs(gaps - usual).max()) <= max(rounding, _JITTER * usual)


def _open(file: BinaryIO) -> tuple[Any, Any]:
    try:
        container = av.open(file, mode="r", metadata_errors="ignore", options={"format_whitelist": _FORMATS})
    except (av.FFmpegError, ValueError, OSError) as error:
        raise UnreadableVideo("it is in no format that is read here") from error
    if not container.streams.video:
        container.close()
        raise UnreadableVideo("it has no video stream")
    stream = container.streams.video[0]
    # The process is one of several: each decodes on one core.
    stream.thread_count = 1
    return container, stream
