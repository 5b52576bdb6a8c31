"""The normalisation of pixels. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.media.image_ops import CLIP_MEAN, CLIP_STD, normalisation_table


@dataclass(frozen=True, slots=True)
class Normalisation:
    """``(byte * scale - mean) / std``, with a mean and a standard deviation per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    def table(self) -> np.ndarray:
        """Normalised value of every byte: float32 ``(channels, 256)``."""
        return normalisation_table(self.mean, self.std, self.scale)


CLIP_NORMALISATION = Normalisation(CLIP_MEAN, CLIP_STD)
HALF_NORMALISATION = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
