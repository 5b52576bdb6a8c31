"""Resizes images with their aspect ratio and pads them to a given size. PIL and numpy only."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from engine.media.resize import resize, resized

_STRIP_PIXELS = 1 << 22


def resize_on_canvas(image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    """Resize an RGB image to fit into ``(width, height)`` and centre it on black, as uint8
    ``(height, width, 3)``. ``resample`` is PIL's filter number.
    """
    width, height = size
    along, down = width / image.width, height / image.height
    if along < down:
        fitted = width, min(math.ceil(image.height * along), height)
    else:
        fitted = min(math.ceil(image.width * down), width), height
    left, top = (width - fitted[0]) // 2, (height - fitted[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + fitted[1], left : left + fitted[0]] = resize(image, fitted, resample)
    return canvas


def whole_and_tiles(image: Image.Image, side: int, tiles: tuple[int, ...], resample: int) -> np.ndarray:
    """Squares of an RGB image, as uint8 ``(1 + down * along, side, side, 3)``.

    The first is the image resized to a square without regard to its aspect ratio; the others are the tiles of
    :func:`resize_on_canvas`, row by row.

    Args:
        side: of a square, in pixels.
        tiles: ``(down, along)``, the tiles in a column and in a row.
        resample: PIL's filter number.
    """
    down, along = tiles
    squares = np.empty((1 + down * along, side, side, 3), np.uint8)
    squares[0] = resize(image, (side, side), resample)
    cut_in_tiles(resize_on_canvas(image, (along * side, down * side), resample), side, out=squares[1:])
    return squares


def cut_in_tiles(pixels: np.ndarray, side: int, out: np.ndarray) -> None:
    """Write the squares of uint8 pixels ``(down * side, along * side, 3)``, row by row, to ``out``
    ``(down * along, side, side, 3)``."""
    rows = pixels.reshape(-1, side, pixels.shape[1] // side, side, 3).swapaxes(1, 2)
    out.reshape(rows.shape)[...] = rows


def resize_in_square(image: Image.Image, side: int, colour: tuple[int, ...], resample: int) -> np.ndarray:
    """Centre an RGB image on a square of ``colour`` with its longer side, and resize that square to ``side``
    pixels: uint8 ``(side, side, 3)``.

    The square of a panorama may be a thousand times its size, so it is never made: it is resized across in
    strips of rows, then down, which are the two passes that PIL makes.
    """
    longest = max(image.size)
    if image.width == image.height or longest == side:
        return resize(centred(image, (longest, longest), colour), (side, side), resample)
    narrow = Image.new("RGB", (side, longest), colour)
    top = (longest - image.height) // 2
    rows = max(1, _STRIP_PIXELS // longest)
    for start in range(0, image.height, rows):
        strip = image.crop((0, start, image.width, min(start + rows, image.height)))
        padded = centred(strip, (longest, strip.height), colour)
        narrow.paste(resized(padded, (side, strip.height), resample), (0, top + start))
    return resize(narrow, (side, side), resample)


def centred(image: Image.Image, size: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
    """A canvas of ``size`` ``(width, height)`` and ``colour`` with ``image`` in its middle."""
    canvas = Image.new("RGB", size, colour)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas
