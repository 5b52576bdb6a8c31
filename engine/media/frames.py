"""Frames of image files that hold several: pages of a TIFF, or an animation's frames as viewers show them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from PIL import Image

from engine.errors import MediaTooLarge
from engine.media.colour import Encoding
from engine.media.decode import (
    ImageLimits,
    check_image_size,
    decode_frame,
    decoder_faults,
    orientation_of,
    shown,
    upright_size,
)
from engine.media.jxl import jxl_size
from engine.media.repair import as_black_is_zero, without_metadata

#: Formats whose frames are images of their own, of any size. Those of the others build on each other.
_SEPARATE = ("TIFF", "MPO")


def count_frames(data: bytes, limits: ImageLimits, *, where: str) -> int:
    """Number of frames; errors as :func:`~engine.media.decode.decode_image`."""
    with decoder_faults(limits, where), _opened(data, limits) as image:
        return getattr(image, "n_frames", 1)


def frame_sizes(
    data: bytes, numbers: Sequence[int], limits: ImageLimits, *, where: str
) -> list[tuple[int, int]]:
    """``(width, height)`` of frames, upright, by their headers.

    Raises:
        MediaTooLarge: a frame is too large, or too much must be unpacked to get at it.
        MediaError: as :func:`~engine.media.decode.decode_image`.
    """
    with decoder_faults(limits, where), _opened(data, limits) as image:
        check_image_size(image.size, limits, where)
        if image.format not in _SEPARATE:
            unpacked = (max(numbers, default=0) + 1) * image.width * image.height
            if unpacked > limits.max_total_pixels:
                raise MediaTooLarge(
                    f"{where}: the frames up to the last one asked for have {unpacked} pixels together; "
                    f"{limits.max_total_pixels} are allowed.",
                    param=where,
                )
            return [upright_size(image)] * len(numbers)
        found = []
        for number in numbers:
            image.seek(number)
            check_image_size(image.size, limits, where)
            found.append(upright_size(image))
        return found


def decode_frames(
    data: bytes, numbers: Sequence[int], limits: ImageLimits, *, where: str
) -> Iterator[Image.Image]:
    """Yield frames as :func:`~engine.media.decode.decode_image` shows the first; errors likewise."""
    with decoder_faults(limits, where):
        data = without_metadata(data)
        with _opened(data, limits) as image:
            separate = image.format in _SEPARATE
            if not separate:
                for number in numbers:
                    if number == 0:
                        # The first frame has nothing below it.
                        yield decode_frame(data, 0, limits, where=where)
                        continue
                    image.seek(number)
                    yield shown(image.copy(), Encoding(), orientation_of(image), where)
        if separate:
            for number in numbers:
                yield decode_frame(data, number, limits, where=where)


def _opened(data: bytes, limits: ImageLimits) -> Image.Image:
    data = without_metadata(data)
    if (packed := jxl_size(data)) is not None:
        check_image_size(packed, limits, None)
    return Image.open(io.BytesIO(as_black_is_zero(data) or data), formats=limits.readable)
