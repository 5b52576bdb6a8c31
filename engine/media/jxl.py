"""Sizes of JPEG XL images by their headers: the decoder in use unpacks an image as soon as it opens it."""

from __future__ import annotations

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
#: Bits of a side's length, by the selector before it (ISO/IEC 18181-1, SizeHeader).
_BITS = (9, 13, 18, 30)
#: Width by height of the usual shapes, by their number.
_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_HEADER_BYTES = 64


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """``(width, height)`` of a JPEG XL image, upright; None for other data."""
    stream = _codestream(data)
    if stream is None:
        return None
    bits = _Bits(stream[len(_CODESTREAM) :])
    small = bits.take(1)
    height = _side(bits, small)
    width, divisor = _RATIOS[bits.take(3)]
    width = width * height // divisor if width else _side(bits, small)
    # The metadata behind the size begin with the orientation, unless all of them have their usual values.
    turned = not bits.take(1) and bits.take(1) and bits.take(3) >= 4
    return (height, width) if turned else (width, height)


def _side(bits: _Bits, small: int) -> int:
    return (bits.take(5) + 1) * 8 if small else bits.take(_BITS[bits.take(2)]) + 1


def _codestream(data: bytes) -> bytes | None:
    """The beginning of the image's codestream."""
    if data.startswith(_CODESTREAM):
        return data[:_HEADER_BYTES]
    if not data.startswith(_CONTAINER):
        return None
    place, found = len(_CONTAINER), b""
    while place + 8 <= len(data) and len(found) < _HEADER_BYTES:
        length, kind, start = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8], place + 8
        if length == 1:
            length, start = int.from_bytes(data[start : start + 8]), start + 8
        end = place + length if length else len(data)
        if end <= place:
            break
        if kind in (b"jxlc", b"jxlp"):
            # A partial codestream has its number before it.
            start += 4 if kind == b"jxlp" else 0
            found += data[start : min(end, start + _HEADER_BYTES)]
        place = end
    return found if found.startswith(_CODESTREAM) else None


class _Bits:
    """Bits of bytes, the lowest of each first. Behind the end all are 0."""

    def __init__(self, data: bytes) -> None:
        self._left = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        value = self._left & ((1 << count) - 1)
        self._left >>= count
        return value
