"""Decoded images of every mode as 8-bit RGB, with the colours that an image viewer shows."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from engine.errors import MediaError

#: TIFF's tags and two of their values.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


@dataclass(frozen=True, slots=True)
class Encoding:
    """A file's encoding of its samples: the parts that Pillow doesn't report after loading.

    Attributes:
        bits: bits of a sample; 0 where the mode tells.
        inverted: 0 is white.
        box: where the first frame lies in the image, if it doesn't fill it.
        low_bytes: the lower bytes of 16-bit RGB samples, where a transparent colour is compared with them.
    """

    bits: int = 0
    inverted: bool = False
    box: tuple[int, int, int, int] | None = None
    low_bytes: Image.Image | None = None

    @classmethod
    def of(cls, image: Image.Image, *, inverted: bool = False) -> Encoding:
        """The encoding of an opened image that isn't loaded yet; for other images the mode tells it all."""
        tile = getattr(image, "tile", None)
        if not tile:
            return cls(inverted=inverted)
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            bits = tags.get(_BITS_PER_SAMPLE, (1,))[0]
            unsigned = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED
            # Pillow inverts smaller samples itself.
            inverted |= tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and bits > 8
            return cls(bits if unsigned else 0, inverted)
        if image.format == "GIF":
            box = tile[0].extents
            return cls(box=None if box in (None, (0, 0, image.width, image.height)) else box)
        if image.format == "PNG":
            found = re.search(r";(\d+)", str(tile[0].args))
            bits = int(found.group(1)) if found else 8
            wide = image.mode == "RGB" and bits == 16 and "transparency" in image.info
            return cls(bits, low_bytes=_low_bytes(image) if wide else None)
        return cls(inverted=inverted)


def to_rgb(image: Image.Image, encoding: Encoding | None = None) -> Image.Image:
    """A loaded image as 8-bit RGB. EXIF is not looked at.

    Opaque images become what ``image.convert("RGB")`` makes of them, as in Transformers. Those with an alpha
    channel or a transparent colour are composed on white, as in its later releases. Where ``convert`` gives
    colours that no viewer shows, they are right: grey of more than 8 bits is scaled, CMYK with a colour
    profile and LAB go through colour management.

    Raises:
        MediaError: the pixels have no meaning as colours, e.g. floats outside of 0 to 255.
    """
    encoding = encoding or Encoding()
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        # Screenshots and clipboards leave the fourth byte at 0.
        return image.convert("RGB")
    transparent = _transparent(image, encoding)
    if transparent is not None:
        pixels = np.array(_opaque(image, encoding))
        pixels[transparent] = 255
        return Image.fromarray(pixels)
    if image.has_transparency_data:
        upper = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, upper).convert("RGB")
    rgb = _opaque(image, encoding)
    if encoding.box is not None:
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgb.crop(encoding.box), encoding.box[:2])
        return white
    return rgb


def _transparent(image: Image.Image, encoding: Encoding) -> np.ndarray | None:
    """Bool ``(height, width)``: pixels of the transparent colour; None if there is none."""
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple):
        pixels, wanted = np.asarray(image), np.array(colour)
        if encoding.low_bytes is None:
            return (pixels == wanted & 255).all(axis=2)
        low = np.asarray(encoding.low_bytes) == wanted & 255
        return (low & (pixels == wanted >> 8)).all(axis=2)
    if not isinstance(colour, int) or not (image.mode in ("1", "L") or image.mode.startswith("I")):
        return None
    grey = np.asarray(image)
    if image.mode == "1":
        return grey == bool(colour)
    # Pillow spreads samples of fewer than 8 bits over 0 to 255, but not the colour.
    few = image.mode == "L" and encoding.bits in (1, 2, 4)
    return grey == (colour * (255 // (2**encoding.bits - 1)) if few else colour)


def _opaque(image: Image.Image, encoding: Encoding) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        bits = 16 if image.mode.startswith("I;16") and not encoding.bits else encoding.bits
        image = Image.fromarray(_as_bytes(np.asarray(image), bits, encoding.inverted))
    if image.mode in ("CMYK", "LAB"):
        return _managed(image)
    return image.convert("RGB")


def _as_bytes(grey: np.ndarray, bits: int, inverted: bool) -> np.ndarray:
    """Grey values ``(height, width)`` of other than 8 bits as uint8.

    Args:
        bits: bits of an integer sample; 0 if unknown: integers are bytes if none is above 255, else 16-bit.
            Floats are fractions of white if none is above 1, else already on the scale to 255.
    """
    if grey.dtype == np.int32 and bits == 32:
        grey = grey.view(np.uint32)
    low, high = (grey.min(), grey.max()) if grey.size else (0, 0)
    if grey.dtype.kind == "f":
        limit, white = 255.0, 1.0 if high <= 1 else 255.0
    else:
        limit = white = 2**bits - 1 if bits else 255 if high <= 255 else 65535
    if not (low >= 0 and high <= limit):
        raise MediaError(
            f"Grey values outside of 0 to {limit:g} have no meaning; convert the image to 8 bits."
        )
    scaled = grey.astype(np.float64) * (255 / white)
    return np.rint(255 - scaled if inverted else scaled).astype(np.uint8)


def _managed(image: Image.Image) -> Image.Image:
    """A CMYK image by its colour profile, or a LAB image, as sRGB."""
    profile, target = image.info.get("icc_profile"), ImageCms.createProfile("sRGB")
    try:
        if image.mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif not profile:
            return image.convert("RGB")
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        # An unusable profile says nothing; viewers go on without it.
        converted = None
    return image.convert("RGB") if converted is None else converted


def _low_bytes(image: Image.Image) -> Image.Image | None:
    """The lower bytes of an opened 16-bit RGB PNG, which Pillow drops, as an RGB image."""
    file = image.fp  # type: ignore[attr-defined]
    if file is None:
        return None
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
        # Read in the other byte order, the lower byte comes out as the higher one.
        again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
        again.load()
        return again
