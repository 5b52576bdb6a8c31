"""Picture operations that families share, and the content hash. PIL and numpy only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    """An RGB picture at ``(width, height)`` as uint8 ``(height, width, 3)``.

    ``resample`` is PIL's filter number, as preprocessor_config.json gives it.
    """
    if image.size != size:
        image = image.resize(size, resample=Image.Resampling(resample))
    return np.asarray(image)


def normalisation_table(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float = 1 / 255
) -> np.ndarray:
    """Normalised value of every byte: float32 ``(channels, 256)``.

    ``(byte * scale - mean) / std`` with the product rounded to float32 once, as Transformers' processors do,
    so that looking a pixel up gives their very number.
    """
    scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    centred = scaled[None] - np.asarray(mean, dtype=np.float32)[:, None]
    return centred / np.asarray(std, dtype=np.float32)[:, None]


def content_hash(
    pixels: np.ndarray, *, family: str, options: Mapping[str, Any], kind: str, size: tuple[int, int]
) -> str:
    """Hex name of a prepared item: equal only where the encoder's result is.

    Args:
        pixels: what the encoder gets; its dtype, shape and bytes all count.
        options: the processor's options that matter for the result, as plain JSON.
        kind: ``image`` or ``video``.
        size: ``(width, height)`` that the processor saw.
    """
    described = json.dumps(
        [family, dict(sorted(options.items())), kind, list(size), str(pixels.dtype), list(pixels.shape)]
    )
    # Processors have instructions for this one: a picture takes half of BLAKE2's time.
    digest = hashlib.sha256(described.encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
