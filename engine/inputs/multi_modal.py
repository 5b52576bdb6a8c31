"""The media of a raw prompt: the entries of ``multi_modal_data``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from engine.errors import InvalidRequest
from engine.inputs.embeds import is_pixels
from engine.inputs.video import is_video_file, read_video, video_source
from engine.media.source import MediaSource

FIELD = "multi_modal_data"


def media_entries(prompt: Mapping[str, Any]) -> Mapping[str, Any]:
    """The prompt's ``multi_modal_data``; empty if it has none.

    Raises:
        InvalidRequest: it is no mapping.
    """
    data = prompt.get(FIELD) or {}
    if not isinstance(data, Mapping):
        raise InvalidRequest(f"{FIELD} must be a dict, not {type(data).__name__}.", param=FIELD)
    return data


def media_sources(data: Mapping[str, Any]) -> list[MediaSource]:
    """The sources of all images, then of all videos.

    Args:
        data: ``image``: a PIL image, bytes of an encoded one, uint8 pixels ``(height, width, 3)``, or a list
            of such; ``video``: the bytes of a file, a list of frames as PIL images, uint8 frames
            ``(n, height, width, 3)``, a message part of the type ``video``, or a list of such.

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
        for value in _many(given, kind):
            where = f"{FIELD}.{kind}[{len(sources)}]"
            if kind == "image":
                sources.append(_source(value, len(sources), where))
            else:
                sources.append(_video(value, len(sources), where))
    return sources


def _many(given: Any, kind: str) -> list[Any]:
    """The values of an entry: one or a list. A list of frames is one video."""
    if not isinstance(given, list | tuple):
        return [given]
    frames = Image.Image | bytes
    one_video = kind == "video" and given and isinstance(given[0], frames) and not is_video_file(given[0])
    return [given] if one_video else list(given)


def _video(value: Any, index: int, where: str) -> MediaSource:
    if isinstance(value, Mapping):
        return video_source(value, "video", index, where)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 4 and value.shape[3] == 3:
        value = [Image.fromarray(frame) for frame in value]
    if isinstance(value, bytes) or (isinstance(value, list | tuple) and value):
        return read_video(value, {}, index, where)
    raise InvalidRequest(
        f"{where} must be bytes of a video file, a list of at least one frame, or uint8 frames (n, h, w, 3), "
        f"not {type(value).__name__}.",
        param=where,
    )


def _source(value: Any, index: int, where: str) -> MediaSource:
    if isinstance(value, Image.Image):
        return MediaSource(index, where, image=value)
    if isinstance(value, bytes):
        return MediaSource(index, where, data=value)
    if is_pixels(value):
        return MediaSource(index, where, image=Image.fromarray(value))
    raise InvalidRequest(f"{where} must be a PIL image, not {type(value).__name__}.", param=where)
