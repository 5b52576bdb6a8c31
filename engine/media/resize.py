"""Pillow's resizing, byte for byte, with several threads for large images. PIL and numpy only."""

from __future__ import annotations

from functools import partial

import numpy as np
import PIL
from PIL import Image

from engine.media.crew import crew
from engine.media.image_ops import rgb_array

#: Half the width of Pillow's filters at scale 1, by filter number: Lanczos, bilinear, bicubic, box, Hamming.
_SUPPORT = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 1.0}
#: Multiplications of a pixel by a weight for each further thread: 2 to 3 ms of work. A thread takes 0.1 ms to
#: start, and each computes all weights of its pass while it holds the GIL.
_SHARE = 1 << 20
#: From Pillow 13 on, the pass down comes first if the height shrinks by more than twice what the width does.
_DOWN_MAY_BE_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def resize(image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    """The pixels of :func:`resized` as uint8 ``(height, width, 3)``."""
    return rgb_array(resized(image, size, resample))


def resized(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """Resize an RGB image to ``(width, height)``; ``image`` itself if it has that size.

    The crew of the calling thread helps with a large image.

    Args:
        resample: PIL's filter number, as preprocessor_config.json gives it.
    """
    if image.size == size:
        return image
    helping = crew()
    threads = _products(image.size, size, resample) // _SHARE
    if helping is None or threads < 2:
        return image.resize(size, Image.Resampling(resample))
    # Pillow filters along one axis after the other, leaves out one that keeps its length, and rounds to bytes
    # in between. So the rows of a pass across are independent of each other, and the columns of a pass down.
    for axis in _passes(image.size, size):
        # Not filled: of a large image that takes as long as a pass.
        made = Image.new("RGB", (size[0], image.height) if axis == 0 else (image.width, size[1]), None)
        helping.share(partial(_filter_band, image, made, axis, resample), threads)
        image = made
    return image


def _passes(size: tuple[int, int], to: tuple[int, int]) -> list[int]:
    """The axes along which Pillow filters, in order: 0 is across, 1 is down."""
    down_first = _DOWN_MAY_BE_FIRST and size[1] - to[1] > max(0, 2 * (size[0] - to[0]))
    return [axis for axis in ((1, 0) if down_first else (0, 1)) if size[axis] != to[axis]]


def _products(size: tuple[int, int], to: tuple[int, int], resample: int) -> int:
    """Products of a pixel and a weight that resizing takes; 0 for a filter without weights."""
    now, total = list(size), 0.0
    for axis in _passes(size, to):
        now[axis] = to[axis]
        total += now[0] * now[1] * 2 * _SUPPORT.get(resample, 0.0) * max(1.0, size[axis] / to[axis])
    return int(total)


def _filter_band(
    image: Image.Image, made: Image.Image, axis: int, resample: int, part: int, parts: int
) -> None:
    """Compute one of ``parts`` bands of ``made``, which is ``image`` resized along ``axis``."""
    length = image.size[1 - axis]
    start, stop = length * part // parts, length * (part + 1) // parts
    if start == stop:
        return
    # A crop, not Pillow's argument ``box``: with an offset it would filter along the other axis as well.
    if axis == 0:
        band = image.crop((0, start, image.width, stop))
        made.paste(band.resize((made.width, stop - start), Image.Resampling(resample)), (0, start))
    else:
        band = image.crop((start, 0, stop, image.height))
        made.paste(band.resize((stop - start, made.height), Image.Resampling(resample)), (start, 0))
