"""How MiniCPM-V divides a picture: into how many slices, and of what size."""

from __future__ import annotations

import math


def slice_grid(size: tuple[int, int], resolution: int, max_slices: int) -> tuple[int, int]:
    """Rows and columns of slices for a picture of ``(width, height)`` pixels: about as many as squares of
    ``resolution`` pixels cover its area, with its aspect ratio; 0 and 0 where one square does.

    Ties are broken as in the published processor: the smaller number of slices, then the fewer columns.
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


def fit(size: tuple[float, float], resolution: int, patch: int, *, upscale: bool) -> tuple[int, int]:
    """Height and width in patches nearest to ``size`` (width and height in pixels), which is first brought to
    the area of a square of ``resolution`` if it is larger, or in any case with ``upscale``.

    The arithmetic, with the width taken from the truncated height, is that of the published processor.
    """
    width, height = size
    if upscale or width * height > resolution**2:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return max(round(height / patch), 1), max(round(width / patch), 1)
