"""Options that hold for all media of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.errors import InvalidRequest
from engine.inputs.video import VIDEO_OPTIONS, video_options
from engine.media.source import MediaSource

PROCESSOR_FIELD, READING_FIELD = "mm_processor_kwargs", "media_io_kwargs"


def with_options(
    sources: Sequence[MediaSource],
    processor: Mapping[str, Any] | None = None,
    reading: Mapping[str, Any] | None = None,
) -> list[MediaSource]:
    """The sources with a request's options. What a part itself asks for comes first.

    Args:
        processor: ``mm_processor_kwargs``: options of the model's processor, and those of videos.
        reading: ``media_io_kwargs``: ``{"video": {"fps": ...}}`` or ``{"video": {"num_frames": ...}}``.

    Raises:
        InvalidRequest: naming the option that can't be used.
    """
    videos = _of_videos(reading or {})
    pixels = {}
    for name, value in (processor or {}).items():
        if name in VIDEO_OPTIONS:
            videos[name] = value, f"{PROCESSOR_FIELD}.{name}"
        else:
            pixels[name] = value
    if not videos and not pixels:
        return list(sources)
    asked = video_options(videos)
    return [
        replace(
            source,
            options=pixels,
            video=asked if source.is_video_file and not source.video.is_set else source.video,
        )
        for source in sources
    ]


def _of_videos(reading: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Value and place of each option of video files."""
    found: dict[str, tuple[Any, str]] = {}
    for kind, options in reading.items():
        where = f"{READING_FIELD}.{kind}"
        if kind not in ("image", "video") or not isinstance(options, Mapping):
            raise InvalidRequest(f"{READING_FIELD} may hold image and video, each an object.", param=where)
        for name, value in options.items():
            if kind != "video" or name not in VIDEO_OPTIONS:
                known = ", ".join(VIDEO_OPTIONS)
                raise InvalidRequest(
                    f"{where}.{name} is not supported; media_io_kwargs.video has {known}.",
                    param=f"{where}.{name}",
                )
            found[name] = value, f"{where}.{name}"
    return found
