"""Options that hold for all media of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.errors import InvalidRequest
from engine.inputs.pages import DOCUMENT_OPTIONS, FRAME_OPTIONS, page_options
from engine.inputs.video import VIDEO_OPTIONS, video_options
from engine.media.documents.pages import ALL_PAGES
from engine.media.source import MediaSource

#: What ``media_io_kwargs`` may hold for each kind of file.
_READING = {"image": FRAME_OPTIONS, "video": VIDEO_OPTIONS, "document": DOCUMENT_OPTIONS}
PROCESSOR_FIELD, READING_FIELD = "mm_processor_kwargs", "media_io_kwargs"


def with_options(
    sources: Sequence[MediaSource],
    processor: Mapping[str, Any] | None = None,
    reading: Mapping[str, Any] | None = None,
) -> list[MediaSource]:
    """The sources with a request's options. What a part itself asks for comes first.

    Args:
        processor: ``mm_processor_kwargs``: options of the model's processor, and those of videos.
        reading: ``media_io_kwargs``: options of each kind of file, such as ``{"video": {"fps": 1}}``,
            ``{"document": {"pages": "1-3"}}`` or ``{"image": {"pages": "all"}}``.

    Raises:
        InvalidRequest: naming the option that can't be used.
    """
    if processor is not None and not isinstance(processor, Mapping):
        raise InvalidRequest(
            f"{PROCESSOR_FIELD} must be an object of the processor's options.", param=PROCESSOR_FIELD
        )
    given = _by_kind(reading or {})
    pixels = {}
    for name, value in (processor or {}).items():
        if name in VIDEO_OPTIONS:
            given["video"][name] = value, f"{PROCESSOR_FIELD}.{name}"
        else:
            pixels[name] = value
    if not pixels and not any(given.values()):
        return list(sources)
    asked = video_options(given["video"])
    pages = {kind: page_options(given[kind]) if given[kind] else None for kind in ("image", "document")}

    def applied(source: MediaSource) -> MediaSource:
        if source.is_video_file and not source.video.is_set:
            return replace(source, options=pixels, video=asked)
        is_file = source.url is not None or source.data is not None or source.kind == "document"
        if is_file and source.pages in (None, ALL_PAGES) and (found := pages.get(source.kind)) is not None:
            return replace(source, options=pixels, pages=found)
        return replace(source, options=pixels)

    return [applied(source) for source in sources]


def _by_kind(reading: Mapping[str, Any]) -> dict[str, dict[str, tuple[Any, str]]]:
    """Value and place of each option, by the kind of file that it is for."""
    found: dict[str, dict[str, tuple[Any, str]]] = {kind: {} for kind in _READING}
    for kind, options in reading.items():
        where = f"{READING_FIELD}.{kind}"
        if kind not in _READING or not isinstance(options, Mapping):
            raise InvalidRequest(
                f"{READING_FIELD} may hold {', '.join(_READING)}, each an object.", param=where
            )
        for name, value in options.items():
            if name not in _READING[kind]:
                raise InvalidRequest(
                    f"{where}.{name} is not supported; {where} has {', '.join(_READING[kind])}.",
                    param=f"{where}.{name}",
                )
            found[kind][name] = value, f"{where}.{name}"
    return found
