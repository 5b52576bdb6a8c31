"""Bilinear resizing without antialiasing, as torch and torchvision do it. numpy only."""

from __future__ import annotations

import numpy as np


def resize_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 ``(height, width, 3)`` to ``(width, height)`` pixels, between the four nearest ones only.

    The bytes are those of ``torch.nn.functional.interpolate`` in float32 on a CPU with fused multiplications
    and additions, rounded: it multiplies the farther neighbour first, and adds the product of the nearer one
    without rounding that. Machines without such instructions differ in some 25 bytes of a million, by 1.
    """
    width, height = size
    left, right, *of_columns = _neighbours(pixels.shape[1], width)
    above, below, *of_rows = _neighbours(pixels.shape[0], height)
    columns = [share[:, None] for share in of_columns]
    rows = [share[:, None, None] for share in of_rows]
    upper, lower = (
        _between(lines[:, left], lines[:, right], columns) for lines in (pixels[above], pixels[below])
    )
    mixed = _between(upper, lower, rows)
    return np.rint(mixed).clip(0, 255).astype(np.uint8)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, ...]:
    """For each of ``new`` pixels along an axis of ``old``: its two neighbours, and their float32 shares."""
    scale = np.float64(np.float32(old) / np.float32(new))
    place = (scale * (np.arange(new) + 0.5) - 0.5).astype(np.float32).clip(0)
    low = np.minimum(place.astype(np.int64), old - 1)
    share = (place - low.astype(np.float32)).clip(0, 1)
    return low, np.minimum(low + 1, old - 1), np.float32(1) - share, share


def _between(near: np.ndarray, far: np.ndarray, shares: list[np.ndarray]) -> np.ndarray:
    """``near * shares[0] + far * shares[1]`` in float32, with one rounding of the second product and one of
    the sum: float64 holds a product of two such numbers exactly."""
    first, second = shares
    other = (far.astype(np.float32) * second).astype(np.float64)
    return (near.astype(np.float64) * first + other).astype(np.float32)
