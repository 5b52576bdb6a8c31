"""How MiniCPM-V divides a picture: into how many slices, and of what size."""

from __future__ import annotations

import math


def slice_grid(size: tuple[int, int], resolution: int, max_slices: int) -> tuple[int, int]:
    """Rows and columns of slices for a picture of ``(width, height)`` pixels: about as many as squares of
    ``resolution`` pixels cover its area, with its aspect ratio; 0 and 0 where one square does.

    Of two that fit equally well it is the one with fewer columns, as in the published processor.
    """
    width, height = size
    wanted = min(math.ceil(width * height / resolution**2), max_slices)
    if wanted <= 1:
        return 0, 0
    grids = [
        (count // columns, columns)
        for count in (wanted - 1, wanted, wanted + 1)
        if 1 < count <= max_slices
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    ratio = math.log(width / height)
    return min(grids, key=lambda grid: abs(ratio - math.log(grid[1] / grid[0])))


def fit(size: tuple[int, int], resolution: int, patch: int) -> tuple[int, int]:
    """Height and width in patches for a picture of ``(width, height)`` pixels, at about the area of a square
    of ``resolution`` pixels.

    The arithmetic, with the width taken from the truncated height, is that of the published processor.
    """
    ratio = size[0] / size[1]
    height = int(resolution / math.sqrt(ratio))
    width = int(height * ratio)
    return max(round(height / patch), 1), max(round(width / patch), 1)
