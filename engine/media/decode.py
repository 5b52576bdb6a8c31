"""Decodes images to upright RGB, within bounds that are checked before anything is unpacked."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import numpy as np
from PIL import Image
from pydantic import PositiveInt, field_validator

from engine.errors import MediaError, MediaTooLarge
from engine.media.colour import Encoding, to_rgb
from engine.media.cut_jpeg import held_by, with_end_marker
from engine.media.formats import ImageFormat, readable
from engine.media.hdr import is_hdr, on_screen
from engine.media.jxl import jxl_size
from engine.media.repair import as_black_is_zero, png_light, without_metadata
from engine.settings import Settings

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
#: Formats whose decoders turn the image. Those of HEIF and JXL ignore EXIF, as their standards ask.
_TURNED = ("TIFF", "HEIF", "JXL")
#: Of a JPEG that ends too early, the largest missing part with which it is still shown.
_MOST_MISSING = 0.5


class ImageLimits(Settings):
    """The largest image that is decoded, and the formats.

    Attributes:
        max_pixels: most pixels, width times height.
        max_side: most pixels along one side.
        max_total_pixels: most pixels of all images and frames of a request.
        formats: Pillow's names of the formats that are read; those whose package isn't installed aren't.
    """

    max_pixels: PositiveInt = 64_000_000
    max_side: PositiveInt = 65_535
    max_total_pixels: PositiveInt = 256_000_000
    formats: tuple[ImageFormat, ...] = get_args(ImageFormat)

    @field_validator("formats")
    @classmethod
    def _some_format_is_read(cls, value: tuple[ImageFormat, ...]) -> tuple[ImageFormat, ...]:
        if not value:
            raise ValueError("at least one format")
        return value

    @property
    def readable(self) -> tuple[str, ...]:
        """The formats that this process can read."""
        return readable(self.formats)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded image.

    Attributes:
        note: what is missing of it, in words; empty if nothing is.
    """

    image: Image.Image
    note: str = ""


def decode_image(data: bytes, limits: ImageLimits, *, where: str | None = None) -> Image.Image:
    """The image of :func:`decode`, which says more."""
    return decode(data, limits, where=where).image


def decode(data: bytes, limits: ImageLimits, *, where: str | None = None) -> Decoded:
    """An image as a person sees it: upright, transparency on white, of several frames the first, 8-bit RGB.

    A JPEG that ends too early is shown if most of it is there, as in viewers; what is missing is grey.

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
            return Decoded(decode_frame(data, 0, limits, where=where))
        except OSError:
            found = _decode_cut(data, limits, where)
            if found is None:
                raise
            return found


def _decode_cut(data: bytes, limits: ImageLimits, where: str | None) -> Decoded | None:
    """A JPEG that ends too early; None if too little of it is there, or it is no JPEG."""
    ended = with_end_marker(data)
    if ended is None:
        return None
    stored = []
    for variant in ended:
        with Image.open(io.BytesIO(variant), formats=("JPEG",)) as image:
            check_image_size(image.size, limits, where)
            stored.append(np.asarray(image))
    differs = (stored[0] != stored[1]).reshape(len(stored[0]), -1).any(axis=1)
    shown_image, held = decode_frame(ended[0], 0, limits, where=where), held_by(data)
    if not differs.any():
        return Decoded(shown_image)
    if held == "all":
        return Decoded(shown_image, "The file ends too early; the image lacks its last details.")
    missing = 1 - int(differs.argmax()) / len(differs)
    if held != "rows" or missing > _MOST_MISSING:
        return None
    return Decoded(
        shown_image, f"The file ends too early; {missing:.0%} of the image are missing and shown grey."
    )


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
            f"{name} is not an image in one of the formats {', '.join(limits.readable)}.",
            param=where,
        ) from None
    except Exception as error:
        raise MediaError(f"{name} is damaged or incomplete and can't be decoded.", param=where) from error


def decode_frame(data: bytes, frame: int, limits: ImageLimits, *, where: str | None) -> Image.Image:
    """One frame as :func:`decode_image` shows the first; a decoder's own exceptions pass through."""
    positive = as_black_is_zero(data, frame)
    if (packed := jxl_size(data)) is not None:
        check_image_size(packed, limits, where)
    with Image.open(io.BytesIO(positive or data), formats=limits.readable) as image:
        image.seek(frame)
        check_image_size(image.size, limits, where)
        encoding = Encoding.of(image, inverted=positive is not None)
        rgb = shown(image, encoding, orientation_of(image), where)
    light = png_light(data)
    return on_screen(rgb, *light) if light is not None and is_hdr(light[1]) else rgb


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
        if (packed := jxl_size(data)) is not None and "JXL" in limits.readable:
            check_image_size(packed, limits, where)
            return packed
        with Image.open(io.BytesIO(as_black_is_zero(data) or data), formats=limits.readable) as image:
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
    if image.format in _TURNED and not getattr(image, "jpeg", False):
        # A JPEG packed as JXL is unpacked as it was, not turned.
        return 1
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
