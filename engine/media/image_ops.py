"""Image operations that families share. PIL and numpy only."""

from __future__ import annotations

import numpy as np
from PIL import Image

from engine.errors import InvalidRequest

MAX_ASPECT_RATIO = 200
"""The limit of the published Qwen2-VL processor."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_aspect_ratio(size: tuple[int, int], most: int = MAX_ASPECT_RATIO) -> None:
    """Check that an image isn't too elongated.

    Raises:
        InvalidRequest: the longer side of an image of ``size`` is more than ``most`` times the shorter.
    """
    if max(size) > most * min(size):
        raise InvalidRequest(
            f"an image of {size[0]}x{size[1]} pixels is too elongated: the longer side may be at most "
            f"{most} times the shorter",
            param="image",
        )


def rgb_array(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image as uint8 ``(height, width, 3)``, not writable.

    Pillow keeps four bytes for a pixel, so one copy is needed. ``np.asarray`` makes two: ``Image.tobytes``
    copies in chunks, and joins them.
    """
    image.load()
    width, height = image.size
    encoder = Image._getencoder("RGB", "raw", "RGB")
    try:
        encoder.setimage(image.im, (0, 0, width, height))
        _, status, data = encoder.encode(max(3 * width * height, 4 * width))
    finally:
        encoder.cleanup()
    if status != 1 or len(data) != 3 * width * height:
        # Another release of Pillow may need several calls.
        return np.asarray(image)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


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
