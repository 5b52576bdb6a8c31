"""Decodes images to upright RGB, within bounds that are checked before anything is unpacked."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image
from pydantic import PositiveInt

from engine.errors import MediaError, MediaTooLarge
from engine.media.colour import Encoding, to_rgb
from engine.media.repair import as_black_is_zero, with_end_marker, without_metadata

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest image that is decoded, and the formats.

    Attributes:
        max_pixels: most pixels, width times height.
        max_side: most pixels along one side.
        max_total_pixels: most pixels of all images and frames of a request.
        formats: Pillow's names of the formats that are read.
    """

    max_pixels: PositiveInt = 64_000_000
    max_side: PositiveInt = 65_535
    max_total_pixels: PositiveInt = 256_000_000
    formats: tuple[ImageFormat, ...] = get_args(ImageFormat)


def decode_image(data: bytes, limits: ImageLimits, *, where: str | None = None) -> Image.Image:
    """An image as a person sees it: upright, transparency on white, of several frames the first, 8-bit RGB.

    Args:
        data: an encoded image.
        where: the field of the request, for errors.

    Raises:
        MediaTooLarge: the header announces more pixels than allowed.
        MediaError: the data is no image of an allowed format, or is damaged.
    """
    with decoder_faults(limits, where):
        data = without_metadata(data)
        try:
            return decode_frame(data, 0, limits, where=where)
        except OSError:
            ended = with_end_marker(data)
            if ended is None:
                raise
            image, other = (decode_frame(variant, 0, limits, where=where) for variant in ended)
            if not np.array_equal(np.asarray(image), np.asarray(other)):
                raise
            return image


@contextmanager
def decoder_faults(limits: ImageLimits, where: str | None) -> Iterator[None]:
    """Turn what decoders raise into :class:`MediaError`, for the field ``where``."""
    name = where or "the image"
    try:
        yield
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaTooLarge(_too_many(name, limits), param=where) from None
    # Decoders raise any exception, with memory addresses and paths in the text: none of it is passed on.
    except Image.UnidentifiedImageError:
        raise MediaError(
            f"{name} is not an image in one of the formats {', '.join(limits.formats)}.", param=where
        ) from None
    except Exception as error:
        raise MediaError(f"{name} is damaged or incomplete and can't be decoded.", param=where) from error


def decode_frame(data: bytes, frame: int, limits: ImageLimits, *, where: str | None) -> Image.Image:
    """One frame as :func:`decode_image` shows the first; a decoder's own exceptions pass through."""
    positive = as_black_is_zero(data, frame)
    with Image.open(io.BytesIO(positive or data), formats=limits.formats) as image:
        image.seek(frame)
        check_image_size(image.size, limits, where)
        encoding = Encoding.of(image, inverted=positive is not None)
        return shown(image, encoding, orientation_of(image), where)


def upright_rgb(image: Image.Image, *, where: str | None = None) -> Image.Image:
    """An image that a caller has opened or made, as :func:`decode_image` would show it.

    Only an image opened from a file is turned: a copy (whose ``format`` is None) may have been turned
    already. Two threads must not pass the same image at a time: its file may be unread yet.

    Raises:
        MediaError: it has no pixels, its file is damaged or closed, or its pixels have no meaning as colours.
    """
    name = where or "the image"
    if min(image.size) < 1:
        raise MediaError(f"{name} has no pixels.", param=where)
    try:
        encoding = Encoding.of(image)
        return shown(image, encoding, orientation_of(image) if image.format else 1, where)
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{name}, of mode {image.mode}, can't be read: {error}", param=where) from error


def read_size(data: bytes, limits: ImageLimits, *, where: str | None = None) -> tuple[int, int]:
    """``(width, height)`` by the header alone, upright; errors as :func:`decode_image`."""
    try:
        data = without_metadata(data)
        with Image.open(io.BytesIO(as_black_is_zero(data) or data), formats=limits.formats) as image:
            check_image_size(image.size, limits, where)
            return upright_size(image)
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaTooLarge(_too_many(where or "the image", limits), param=where) from None
    except Exception:
        # Decoding says what is wrong with it.
        return decode_image(data, limits, where=where).size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """``(width, height)`` of an opened image once it is upright."""
    return (image.height, image.width) if orientation_of(image) >= 5 else image.size


def check_total(sizes: Iterable[tuple[int, int]], limits: ImageLimits) -> None:
    """Refuse what would take too much memory once decoded.

    Args:
        sizes: of all images and frames of a request.

    Raises:
        MediaTooLarge: naming the limit.
    """
    total = sum(width * height for width, height in sizes)
    if total > limits.max_total_pixels:
        raise MediaTooLarge(
            f"The request's images have {total} pixels together; {limits.max_total_pixels} are allowed. "
            "Send fewer or smaller ones.",
            param="prompt",
        )


def check_image_size(size: tuple[int, int], limits: ImageLimits, where: str | None) -> None:
    """Refuse an image of ``(width, height)`` pixels that is larger than allowed, or has none.

    Raises:
        MediaError: naming ``where``.
    """
    (width, height), name = size, where or "the image"
    if width * height > limits.max_pixels or max(size) > limits.max_side:
        raise MediaTooLarge(_too_many(name, limits) + f" It has {width} x {height}.", param=where)
    if min(size) < 1:
        raise MediaError(f"{name} has no pixels.", param=where)


def _too_many(name: str, limits: ImageLimits) -> str:
    return f"{name} has more than {limits.max_pixels} pixels, or more than {limits.max_side} along a side."


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation; 1 (upright) where it is missing, unreadable or out of range, as in viewers."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def shown(image: Image.Image, encoding: Encoding, orientation: int, where: str | None) -> Image.Image:
    """An opened image, loaded, as upright 8-bit RGB."""
    image.load()
    try:
        rgb = to_rgb(image, encoding)
    except MediaError as error:
        raise MediaError(error.message, param=where) from None
    turn = _TURNS.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)
