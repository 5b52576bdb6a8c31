"""JPEG files that end too early: what of the image they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

_JPEG = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"
#: Markers that follow the coefficients of a scan; the others belong to these.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN = 0xDA
#: Starts of frames; tables (C4), extensions (C8) and conditions (CC) have numbers between theirs.
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: Scans up to this one bring the finest details.
_LAST_COEFFICIENT = 63
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}


def with_end_marker(data: bytes) -> tuple[bytes, bytes] | None:
    """A JPEG that lacks its end marker, with one, in two variants; None for any other data.

    The second variant has bytes before the marker that continue the last scan. Both decode to the same pixels
    only if the scan is complete; otherwise they differ from the row on at which the file ends.
    """
    if not data.startswith(_JPEG):
        return None
    data = data.rstrip(b"\xff")
    return data + _END_OF_IMAGE, data + b"\x5a" * 256 + _END_OF_IMAGE


def held_by(data: bytes) -> Literal["rows", "all", "too little"]:
    """The part of the image that a cut file holds.

    Returns:
        ``rows``: the upper rows, whole; ``all``: of a progressive file, all but its last details.
    """
    components, progressive = 0, False
    scans: list[tuple[set[int], bool]] = []
    for kind, body in _segments(data):
        if kind in _FRAMES:
            components, progressive = body[5] if len(body) > 5 else 0, kind in _PROGRESSIVE
        elif kind == _START_OF_SCAN and body and len(body) >= 2 * body[0] + 4:
            scans.append((set(body[1 : 1 + 2 * body[0] : 2]), body[2 * body[0] + 2] == _LAST_COEFFICIENT))
    if not components or not scans:
        return "too little"
    if not progressive:
        return "rows" if len(scans[0][0]) == components else "too little"
    # The last scan is the one that is cut.
    detailed = {number for numbers, has_detail in scans[:-1] if has_detail for number in numbers}
    return "all" if len(detailed) == components else "too little"


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each segment. Coefficients are passed over."""
    place = len(_JPEG)
    while (found := _NEXT_MARKER.search(data, place)) is not None:
        place = found.end()
        kind, length = data[place - 1], int.from_bytes(data[place : place + 2])
        yield kind, data[place + 2 : place + length]
        place += length
