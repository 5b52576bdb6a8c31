"""Pages of documents and frames of images: what a caller asks for, and their place in a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.errors import InvalidRequest
from engine.media.documents.pages import PageOptions
from engine.prompt import MediaItem, MediaPart, Message, PagesItem, TextPart

#: What a caller may ask of a document, and of an image with several frames.
DOCUMENT_OPTIONS = ("pages", "max_pages", "dpi", "text")
FRAME_OPTIONS = ("pages", "max_pages")

_RANGE = re.compile(r"\s*([1-9]\d{0,8})\s*(?:(-)\s*(?:([1-9]\d{0,8})\s*)?)?")
_MOST_RANGES = 1000


def page_options(options: Mapping[str, tuple[Any, str]]) -> PageOptions:
    """The pages that are asked for.

    Args:
        options: value and place of ``pages`` (such as ``"1-3,7,10-"``, a page, a list of pages, ``"all"``),
            ``max_pages``, ``dpi`` and ``text``; null is absence.

    Raises:
        InvalidRequest: naming the option that can't be used.
    """
    given = {name: pair for name, pair in options.items() if pair[0] is not None}
    most, dpi, text = (given.get(name) for name in ("max_pages", "dpi", "text"))
    if most is not None and (type(most[0]) is not int or most[0] < 1):
        raise InvalidRequest(f"{most[1]} must be an integer from 1.", param=most[1])
    if dpi is not None and (type(dpi[0]) not in (int, float) or not dpi[0] > 0):
        raise InvalidRequest(f"{dpi[1]} must be a number above 0.", param=dpi[1])
    if text is not None and type(text[0]) is not bool:
        raise InvalidRequest(f"{text[1]} must be true or false.", param=text[1])
    return PageOptions(
        _ranges(*given["pages"]) if "pages" in given else (),
        None if most is None else most[0],
        None if dpi is None else float(dpi[0]),
        text is not None and text[0],
    )


def _ranges(value: Any, where: str) -> tuple[tuple[int, int | None], ...]:
    fault = InvalidRequest(
        f'{where} must be pages, counted from 1, such as "1-3,7", [1, 2, 3] or "all".', param=where
    )
    if value == "all":
        return ((1, None),)
    entries = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if not 0 < len(entries) <= _MOST_RANGES:
        raise fault
    found: list[tuple[int, int | None]] = []
    for entry in entries:
        match = _RANGE.fullmatch(entry if isinstance(entry, str) else f"{entry!r}")
        if match is None or not isinstance(entry, str | int):
            raise fault
        first = int(match[1])
        last = first if match[2] is None else None if match[3] is None else int(match[3])
        if last is not None and last < first:
            raise fault
        found.append((first, last))
    return tuple(found)


def spread(
    messages: Sequence[Message], items: Sequence[MediaItem | PagesItem]
) -> tuple[list[Message], list[MediaItem]]:
    """Put the pages of each document, and their texts, in its place.

    Args:
        messages: whose parts refer to ``items`` by index.

    Returns:
        The messages, whose parts refer to the items that are returned beside them.
    """
    if not any(isinstance(item, PagesItem) for item in items):
        return list(messages), [item for item in items if isinstance(item, MediaItem)]
    flat: list[MediaItem] = []
    parts_of: list[list[TextPart | MediaPart]] = []
    for item in items:
        parts: list[TextPart | MediaPart] = []
        pages = item.pages if isinstance(item, PagesItem) else (item,)
        texts = item.texts if isinstance(item, PagesItem) else ()
        for place, page in enumerate(pages):
            parts.append(MediaPart(len(flat), page.kind))
            flat.append(page)
            if texts and texts[place]:
                parts.append(TextPart(texts[place]))
        parts_of.append(parts)
    return [
        replace(
            message,
            parts=[
                other
                for part in message.parts
                for other in (parts_of[part.index] if isinstance(part, MediaPart) else [part])
            ],
        )
        for message in messages
    ], flat
