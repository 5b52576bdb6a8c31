"""Valid image files that Pillow refuses, as files that it reads."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
#: Chunks that say how a PNG looks. acTL, fcTL and fdAT are those of animations.
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"cICP", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
#: XMP may hold the orientation. Pillow refuses a file with longer text.
_XMP, _XMP_LIMIT = b"XML:com.adobe.xmp\0\0", 1 << 20
#: TIFF's tags, and the value of a photometric interpretation in which 0 is white.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLES_PER_PIXEL = 258, 262, 277
_WHITE_IS_ZERO = 0


def without_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that don't show; any other data as it is.

    Pillow refuses the whole image where such a chunk is large once unpacked, or its checksum is wrong.
    """
    if not data.startswith(_PNG):
        return data
    kept, start, whole = [_PNG], len(_PNG), True
    for kind, end in _png_chunks(data):
        if _shows(data, kind, start, end):
            kept.append(data[start:end])
        else:
            whole = False
        start = end
    return data if whole else b"".join([*kept, data[start:]])


def png_light(data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer function of a PNG by its chunk cICP (ITU-T H.273); None if it has none."""
    if not data.startswith(_PNG):
        return None
    start = len(_PNG)
    for kind, end in _png_chunks(data):
        if kind == b"cICP" and end - start == 16:
            return data[start + 8], data[start + 9]
        if kind == b"IDAT":
            return None
        start = end
    return None


def as_black_is_zero(data: bytes, page: int = 0) -> bytes | None:
    """A TIFF in whose ``page`` 0 is white, in grey samples of more than 8 bits, with the tag that says that 0
    is black; None for any other data. Pillow inverts smaller samples, and ignores or refuses the tag here."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 10:
        return None
    try:
        pointer = 4
        for _ in range(page + 1):
            (directory,) = struct.unpack_from(order + "I", data, pointer)
            (count,) = struct.unpack_from(order + "H", data, directory)
            pointer = directory + 2 + 12 * count
        tags = {}
        for place in range(directory + 2, pointer, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", data, place)
            if kind == 3 and number == 1:
                tags[tag] = place + 8, *struct.unpack_from(order + "H", data, place + 8)
    except struct.error:
        return None
    place, photometric = tags.get(_PHOTOMETRIC, (0, None))
    if photometric != _WHITE_IS_ZERO or tags.get(_BITS_PER_SAMPLE, (0, 1))[1] <= 8:
        return None
    if tags.get(_SAMPLES_PER_PIXEL, (0, 1))[1] != 1:
        return None
    return data[:place] + struct.pack(order + "H", 1) + data[place + 2 :]


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Kind and end of each whole chunk of a PNG."""
    start = len(_PNG)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        start += 12 + length
        if start > len(data):
            return
        yield kind, start


def _shows(data: bytes, kind: bytes, start: int, end: int) -> bool:
    """Return whether a chunk of a PNG changes what is seen; ancillary ones only with the right checksum."""
    ancillary = kind[:1].islower()
    if kind == b"iTXt":
        shows = end - start < _XMP_LIMIT and data.startswith(_XMP, start + 8)
    else:
        shows = kind in _PNG_CHUNKS or not ancillary
    if not shows or not ancillary:
        return shows
    (checksum,) = struct.unpack_from(">I", data, end - 4)
    return zlib.crc32(memoryview(data)[start + 4 : end - 4]) == checksum
