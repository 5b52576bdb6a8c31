"""Images to measure with."""

from __future__ import annotations

import numpy as np
from PIL import Image


def unique_picture(size: int, seed: int) -> Image.Image:
    """A smooth random square image: no two are alike, and none compresses to nothing."""
    noise = np.random.default_rng(seed).integers(0, 256, (max(1, size // 8),) * 2 + (3,), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
