"""The centre of a resized image. PIL and numpy only."""

from __future__ import annotations

import numpy as np
from PIL import Image

from engine.media.resize import resize

#: Enlarged images with more pixels than this are not made as a whole.
_WHOLE_PIXELS = 1 << 26
#: Fractional bits of PIL's filter coefficients for 8-bit images.
_PRECISION = 22
#: Half the width of PIL's filters at scale 1, by filter number: bilinear and bicubic.
FILTERS = {2: 1.0, 3: 2.0}


def centre_of_resized(image: Image.Image, size: tuple[int, int], side: int, resample: int) -> np.ndarray:
    """The centre square of an RGB image resized to ``size`` (width and height): uint8 ``(side, side, 3)``.

    An enlarged panorama may take gigabytes. Of such an image only the centre is computed, by PIL's own
    arithmetic, so every byte is the same.

    Args:
        resample: PIL's filter number.
    """
    width, height = size
    # PIL filters enlarged images across before down; some versions filter reduced ones the other way round.
    enlarged = width >= image.width and height >= image.height and min(size) >= side
    if width * height <= _WHOLE_PIXELS or not enlarged or resample not in FILTERS:
        return centre_square(resize(image, size, resample), side)
    left, top = (width - side) // 2, (height - side) // 2
    columns = _coefficients(image.width, width, range(left, left + side), resample)
    rows = _coefficients(image.height, height, range(top, top + side), resample)
    box = (columns[0][0, 0], rows[0][0, 0], columns[0][-1, -1] + 1, rows[0][-1, -1] + 1)
    part = np.asarray(image.crop(box))
    across = _filtered(part.swapaxes(0, 1), columns, box[0]).swapaxes(0, 1)
    return _filtered(across, rows, box[1])


def centre_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """The centre ``(side, side, 3)`` of an image ``(height, width, 3)``, black where the image is smaller."""
    height, width = pixels.shape[:2]
    canvas_height, canvas_width = max(height, side), max(width, side)
    canvas = pixels
    if (canvas_height, canvas_width) != (height, width):
        canvas = np.zeros((canvas_height, canvas_width, 3), pixels.dtype)
        above, before = -((height - canvas_height) // 2), -((width - canvas_width) // 2)
        canvas[above : above + height, before : before + width] = pixels
    top, left = (canvas_height - side) // 2, (canvas_width - side) // 2
    return np.ascontiguousarray(canvas[top : top + side, left : left + side])


def _coefficients(length: int, resized: int, wanted: range, resample: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and weights of the pixels ``wanted`` along an axis that is resized from ``length`` pixels.

    The arithmetic is that of PIL's ``precompute_coeffs`` and ``normalize_coeffs_8bpc``.

    Returns:
        Indices and integer weights, both ``(len(wanted), taps)`` int64. Taps outside of the filter or the
        image repeat an index of the image and have weight 0.
    """
    scale = length / resized
    stretch = max(scale, 1.0)
    support = FILTERS[resample] * stretch
    centre = (np.arange(wanted.start, wanted.stop) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + support + 0.5).astype(np.int64), length)
    index = first[:, None] + np.arange(int((stop - first).max()))
    weights = _filter((index - centre[:, None] + 0.5) * (1.0 / stretch), resample)
    weights[index >= stop[:, None]] = 0.0
    # Summed one after the other, as in C; np.sum would add in pairs.
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]
    fixed = np.trunc(weights * (1 << _PRECISION) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    return np.minimum(index, stop[:, None] - 1), fixed


def _filter(x: np.ndarray, resample: int) -> np.ndarray:
    """PIL's filter at the distances ``x`` from its centre."""
    x = np.abs(x)
    if resample == 2:
        return np.maximum(1.0 - x, 0.0)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _filtered(pixels: np.ndarray, taps: tuple[np.ndarray, np.ndarray], start: int) -> np.ndarray:
    """Filter the first axis of ``pixels``, whose index 0 is the image's index ``start``."""
    index, weights = taps
    total = np.full((len(index), *pixels.shape[1:]), 1 << (_PRECISION - 1), np.int64)
    for tap in range(index.shape[1]):
        total += pixels[index[:, tap] - start].astype(np.int64) * weights[:, tap, None, None]
    return (total >> _PRECISION).clip(0, 255).astype(np.uint8)
