"""The media of a raw prompt: the entries of ``multi_modal_data``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from engine.errors import InvalidRequest
from engine.media.source import MediaSource

FIELD = "multi_modal_data"


def media_sources(data: Mapping[str, Any]) -> list[MediaSource]:
    """The sources of all images, then of all videos.

    Args:
        data: ``image``: a PIL image, bytes of an encoded one, or a list of such; ``video``: a list of frames
            of the same kinds, or a list of such lists.

    Raises:
        InvalidRequest: naming the entry that can't be used.
    """
    unknown = data.keys() - {"image", "video"}
    if unknown:
        raise InvalidRequest(f"{FIELD} has no entry {sorted(unknown)[0]!r}.", param=FIELD)
    sources: list[MediaSource] = []
    for kind in ("image", "video"):
        given = data.get(kind)
        if given is None:
            continue
        many = given if isinstance(given, list | tuple) else [given]
        if kind == "video" and many and isinstance(many[0], Image.Image | bytes):
            many = [many]
        for value in many:
            where = f"{FIELD}.{kind}[{len(sources)}]"
            if kind == "image":
                sources.append(_source(value, len(sources), where))
            else:
                sources.append(_video(value, len(sources), where))
    return sources


def _video(frames: Any, index: int, where: str) -> MediaSource:
    if not isinstance(frames, list | tuple) or not frames:
        raise InvalidRequest(
            f"{where} must be a list of at least one frame, not {type(frames).__name__}.", param=where
        )
    return MediaSource(index, where, "video", frames=tuple(_source(frame, index, where) for frame in frames))


def _source(value: Any, index: int, where: str) -> MediaSource:
    if isinstance(value, Image.Image):
        return MediaSource(index, where, image=value)
    if isinstance(value, bytes):
        return MediaSource(index, where, data=value)
    raise InvalidRequest(f"{where} must be a PIL image, not {type(value).__name__}.", param=where)
