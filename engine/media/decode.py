"""Encoded pictures to upright RGB, within bounds that are checked before anything is unpacked."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image
from pydantic import PositiveInt

from engine.errors import MediaError, MediaTooLarge

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
    """What a picture may be.

    Attributes:
        max_pixels: most pixels, width times height.
        max_side: most pixels along one side.
        max_total_pixels: most pixels of all pictures and frames of a request.
        formats: Pillow's names of the formats that are read.
    """

    max_pixels: PositiveInt = 64_000_000
    max_side: PositiveInt = 65_535
    max_total_pixels: PositiveInt = 256_000_000
    formats: tuple[ImageFormat, ...] = get_args(ImageFormat)


def decode_image(data: bytes, limits: ImageLimits, *, where: str | None = None) -> Image.Image:
    """A picture as a person sees it: upright, transparency on white, of several frames the first, 8-bit RGB.

    Args:
        data: an encoded picture.
        where: the field of the request, for errors.

    Raises:
        MediaTooLarge: the header announces more pixels than allowed.
        MediaError: the data is no picture of an allowed format, or is damaged.
    """
    name = where or "the picture"
    try:
        with Image.open(io.BytesIO(data), formats=limits.formats) as image:
            _check_size(image.size, limits, name, where)
            orientation = _orientation(image)
            image.load()
            return _upright(to_rgb(image), orientation)
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaTooLarge(_too_many(name, limits), param=where) from None
    # Decoders raise whatever they like, with addresses and paths in the text: none of it is passed on.
    except Image.UnidentifiedImageError:
        raise MediaError(
            f"{name} is no picture in one of the formats {', '.join(limits.formats)}.", param=where
        ) from None
    except Exception as error:
        raise MediaError(f"{name} is damaged or incomplete and can't be decoded.", param=where) from error


def upright_rgb(image: Image.Image, *, where: str | None = None) -> Image.Image:
    """A picture that a caller has opened or made, as :func:`decode_image` would show it.

    Turned is only what is as its file has it: a copy made from that (its ``format`` is None) may have been
    turned already. Not for two threads at a time with one picture: its file may be unread yet.

    Raises:
        MediaError: it has no pixels, its file is damaged or closed, or its pixels have no meaning as colours.
    """
    name = where or "the picture"
    if min(image.size) < 1:
        raise MediaError(f"{name} has no pixels.", param=where)
    try:
        orientation = _orientation(image) if image.format else 1
        image.load()
        return _upright(to_rgb(image), orientation)
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{name}, of mode {image.mode}, can't be read: {error}", param=where) from error


def read_size(data: bytes, limits: ImageLimits, *, where: str | None = None) -> tuple[int, int]:
    """``(width, height)`` by the header alone, upright; errors as :func:`decode_image`."""
    name = where or "the picture"
    try:
        with Image.open(io.BytesIO(data), formats=limits.formats) as image:
            _check_size(image.size, limits, name, where)
            turned = _orientation(image) >= 5
            return (image.height, image.width) if turned else image.size
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaTooLarge(_too_many(name, limits), param=where) from None
    except Exception:
        # Decoding says what is wrong with it.
        return decode_image(data, limits, where=where).size


def check_total(sizes: Iterable[tuple[int, int]], limits: ImageLimits) -> None:
    """Refuse what would take too much memory once decoded.

    Args:
        sizes: of all pictures and frames of a request.

    Raises:
        MediaTooLarge: naming the limit.
    """
    total = sum(width * height for width, height in sizes)
    if total > limits.max_total_pixels:
        raise MediaTooLarge(
            f"The request's pictures have {total} pixels together; {limits.max_total_pixels} are allowed. "
            "Send fewer or smaller ones.",
            param="messages",
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture as 8-bit RGB.

    Opaque pictures become what ``image.convert("RGB")`` makes of them, as in Transformers. Those with an
    alpha channel or a transparent colour are composed on white, as in its later releases, and 16-bit and
    float grey is scaled to 8 bits (``convert`` would clip it). EXIF is not looked at.

    Raises:
        MediaError: the pixels have no meaning as colours, e.g. floats outside of 0 to 255.
    """
    if image.has_transparency_data:
        upper = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, upper).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_as_bytes(np.asarray(image)))
    return image.convert("RGB")


def _as_bytes(grey: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, ``(height, width)``, as uint8.

    Integers are 16-bit. Floats are fractions of white if none is above 1, else already on the scale to 255.
    """
    low, high = (grey.min(), grey.max()) if grey.size else (0, 0)
    limit = 255 if grey.dtype.kind == "f" else 65535
    if not (low >= 0 and high <= limit):
        raise MediaError(
            f"Grey values outside of 0 to {limit} have no meaning; convert the picture to 8 bits."
        )
    if grey.dtype.kind == "f":
        return np.rint(grey * (255 if high <= 1 else 1)).astype(np.uint8)
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _check_size(size: tuple[int, int], limits: ImageLimits, name: str, where: str | None) -> None:
    width, height = size
    if width * height > limits.max_pixels or max(size) > limits.max_side:
        raise MediaTooLarge(_too_many(name, limits) + f" It has {width} x {height}.", param=where)
    if min(size) < 1:
        raise MediaError(f"{name} has no pixels.", param=where)


def _too_many(name: str, limits: ImageLimits) -> str:
    return f"{name} has more than {limits.max_pixels} pixels, or more than {limits.max_side} along a side."


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 (upright) where there is none or it can't be read, as viewers have it."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
