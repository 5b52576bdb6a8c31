"""The order of patches in which merged squares are neighbours. No torch here."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def nested_order(height: int, width: int, side: int) -> np.ndarray:
    """Indices, row by row, of the patches of a ``height`` by ``width`` grid: int64 ``(height * width,)``.

    Squares of ``side`` by ``side`` patches (2 or 4) lie row by row, in each the windows of 2 by 2, and in
    each of these its patches.
    """
    grid = np.arange(height * width).reshape(height // side, side // 2, 2, width // side, side // 2, 2)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(-1)
