"""Video parts of messages: files and lists of frames, and the frames that are asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from engine.errors import InvalidRequest, MediaError
from engine.media.source import MediaSource
from engine.media.video.video import VideoOptions

#: Bounds of what a caller may ask for.
MAX_FPS, MAX_FRAMES = 1000.0, 1 << 16

_DATA = re.compile(r"data:(?:(image|video)/|application/pdf[;,])", re.IGNORECASE)
_FRAMES = re.compile(r"data:video/jpeg;base64,", re.IGNORECASE)
_SUFFIXES = {
    "video": {"mp4", "m4v", "webm", "mkv", "mov", "avi"},
    "image": {"png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"},
    "document": {"pdf"},
}
#: What a request may ask of all its video files.
VIDEO_OPTIONS = ("fps", "num_frames")
_OPTIONS = (*VIDEO_OPTIONS, "timestamps")


def media_kind(url: str, filename: Any = None) -> str | None:
    """``image``, ``video`` or ``document``, as a data URL, a file's name or a URL's end says; else None."""
    if found := _DATA.match(url):
        return (found.group(1) or "document").lower()
    for name in (filename, None if url.startswith("data:") else url.partition("?")[0]):
        suffix = name.rpartition(".")[2].lower() if isinstance(name, str) else ""
        for kind, suffixes in _SUFFIXES.items():
            if suffix in suffixes:
                return kind
    return None


def is_video_file(value: Any) -> bool:
    """Return whether bytes begin as MP4 and MOV, Matroska and WebM, or AVI files do."""
    if not isinstance(value, bytes | bytearray):
        return False
    boxes = (b"ftyp", b"moov", b"mdat", b"wide")
    return value[4:8] in boxes or value[:4] == b"\x1aE\xdf\xa3" or value[8:12] == b"AVI "


def video_source(part: Mapping[str, Any], kind: str, index: int, where: str, uuid: str = "") -> MediaSource:
    """The video of a message part: a file by URL or as bytes, or a list of frames.

    Args:
        part: ``{"type": kind, kind: value}``, where the value may be an object with ``url``. Options stand
            in the part or in that object.
        kind: ``video_url``, ``input_video`` or ``video``.
        uuid: the caller's name for the video, which may stand in its place.

    Raises:
        InvalidRequest: naming the field that can't be used.
    """
    key = "video_url" if kind == "input_video" and "video" not in part else kind.removeprefix("input_")
    value, holders, where_value = part.get(key), [(part, where)], f"{where}.{key}"
    if isinstance(value, Mapping):
        holders.insert(0, (value, where_value))
        value, where_value = value.get("url"), f"{where_value}.url"
    options = {
        name: (held[name], f"{at}.{name}")
        for held, at in reversed(holders)
        for name in _OPTIONS
        if name in held
    }
    if value is None and uuid:
        return MediaSource(index, f"{where}.uuid", "video", video=video_options(options))
    return read_video(value, options, index, where_value)


def read_video(value: Any, options: Mapping[str, tuple[Any, str]], index: int, where: str) -> MediaSource:
    """A video from its value: a URL, bytes of a file, or a list of frames.

    Args:
        options: value and place of ``fps``, ``num_frames`` and ``timestamps`` where they are given.
    """
    asked = video_options(options)
    if isinstance(value, str) and (found := _FRAMES.match(value)):
        # Frames as vLLM's clients send them: JPEG files one behind the other.
        prefix = "data:image/jpeg;base64,"
        value = [prefix + frame for frame in value[found.end() :].split(",")]
    if isinstance(value, list | tuple) and value:
        return _of_frames(value, asked, options, index, where)
    if asked.times:
        at = options["timestamps"][1]
        raise InvalidRequest(f"{at} belongs to a list of frames; a file has its own.", param=at)
    if isinstance(value, str) and value:
        return MediaSource(index, where, "video", url=value, video=asked)
    if isinstance(value, bytes | bytearray):
        return MediaSource(index, where, "video", data=bytes(value), video=asked)
    raise MediaError(
        f"{where} must be the URL of a video (http, https or data), or a list of at least one frame.",
        param=where,
    )


def _of_frames(
    frames: Sequence[Any], asked: VideoOptions, options: Mapping[str, Any], index: int, where: str
) -> MediaSource:
    if asked.num_frames is not None:
        at = options["num_frames"][1]
        raise InvalidRequest(f"{at} chooses frames of a file; of a list all are shown.", param=at)
    if asked.times and len(asked.times) != len(frames):
        at = options["timestamps"][1]
        raise InvalidRequest(
            f"{at} must have one second for each of the {len(frames)} frames, not {len(asked.times)}.",
            param=at,
        )
    taken = tuple(_frame(frame, index, f"{where}[{i}]") for i, frame in enumerate(frames))
    return MediaSource(index, where, "video", frames=taken, video=asked)


def _frame(value: Any, index: int, where: str) -> MediaSource:
    if isinstance(value, Mapping):
        # A frame written as an image part.
        inner = value.get("image_url", value.get("url"))
        value = inner.get("url") if isinstance(inner, Mapping) else inner
    if isinstance(value, str) and value:
        return MediaSource(index, where, url=value)
    if isinstance(value, bytes | bytearray):
        return MediaSource(index, where, data=bytes(value))
    if hasattr(value, "convert") and hasattr(value, "size"):
        return MediaSource(index, where, image=value)
    raise MediaError(f"{where} must be an image: its URL, its bytes or a PIL image.", param=where)


def video_options(options: Mapping[str, tuple[Any, str]]) -> VideoOptions:
    """The frames that are asked for.

    Args:
        options: value and place of ``fps``, ``num_frames`` or ``timestamps``; null is absence.

    Raises:
        InvalidRequest: naming the option that can't be used.
    """
    given = {name: pair for name, pair in options.items() if pair[0] is not None}
    fps = _number(*given["fps"], MAX_FPS) if "fps" in given else None
    count = _count(*given["num_frames"]) if "num_frames" in given else None
    if len(given) > 1:
        first, second, *_ = given
        at = given[second][1]
        raise InvalidRequest(f"{at} and {first} exclude each other; send one of them.", param=at)
    return VideoOptions(fps, count, _times(*given["timestamps"]) if "timestamps" in given else ())


def _number(value: Any, where: str, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise InvalidRequest(f"{where} must be a number above 0 and up to {most:g}.", param=where)
    return float(value)


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_FRAMES:
        raise InvalidRequest(f"{where} must be an integer from 1 to {MAX_FRAMES}.", param=where)
    return value


def _times(value: Any, where: str) -> tuple[float, ...]:
    usable = isinstance(value, list | tuple) and all(map(_is_second, value))
    if not usable or any(later <= earlier for earlier, later in pairwise(value)):
        raise InvalidRequest(f"{where} must be a list of rising seconds, from 0.", param=where)
    return tuple(map(float, value))


def _is_second(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0
