"""Images of every mode that Pillow has, in odd sizes, and the colours that a viewer sees in them."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

#: Modes whose pixels mean colours, with what a drawn image of the mode may hold.
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F")


def draw_image(rng: random.Random, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """An image of ``size`` (width, height): random patches of about 8 pixels, smoothly joined."""
    colours = _smooth(rng, size)
    if mode in ("LA", "PA", "RGBA"):
        image = colours.quantize(17).convert(mode) if mode == "PA" else colours.convert(mode)
        image.putalpha(_smooth(rng, size).convert("L"))
        return image
    if mode == "P":
        image = colours.quantize(13)
        if rng.random() < 0.5:
            image.info["transparency"] = rng.randrange(13)
        return image
    if mode in ("I;16", "I", "F"):
        return Image.fromarray(_deep(rng, np.asarray(colours.convert("L")), mode))
    return colours.convert(mode)


def seen(image: Image.Image) -> Image.Image:
    """The RGB image that a viewer shows: transparency on white, deep grey scaled to 8 bits."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layers = np.asarray(image.convert("RGBA")).astype(np.float64)
        alpha = layers[..., 3:] / 255
        flat = layers[..., :3] * alpha + 255 * (1 - alpha)
        exact = Image.fromarray(np.rint(flat).astype(np.uint8))
        # Pillow rounds some sums down: its own result is taken where the two are a step apart.
        white = Image.new("RGBA", image.size, "white")
        theirs = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        assert np.abs(np.asarray(exact).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
        return theirs
    if image.mode[0] in "IF":
        grey = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            white = 1.0 if grey.max() <= 1 else 255.0
        else:
            white = 255.0 if image.mode == "I" and grey.max() <= 255 else 65535.0
        return Image.fromarray(np.floor(grey * 255 / white + 0.5).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def draw_size(rng: random.Random, area: int, longest: float = 8.0) -> tuple[int, int]:
    """A size (width, height) with at most about ``area`` pixels and a ratio of at most ``longest``."""
    pixels = rng.choice((area, area / 3, area / 10, 30))
    ratio = longest ** rng.uniform(-1, 1)
    return max(1, round((pixels * ratio) ** 0.5)), max(1, round((pixels / ratio) ** 0.5))


def _smooth(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    width, height = size
    noise = np.random.default_rng(rng.getrandbits(32)).integers(
        0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8
    )
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def _deep(rng: random.Random, grey: np.ndarray, mode: str) -> np.ndarray:
    if mode == "F":
        return (grey / 255).astype(np.float32) if rng.random() < 0.5 else grey.astype(np.float32)
    wide = grey.astype(np.int64) * 257 - (grey.astype(np.int64) * 31 % 100)
    if mode == "I;16":
        return np.clip(wide, 0, 65535).astype(np.uint16)
    return grey.astype(np.int32) if rng.random() < 0.5 else np.clip(wide, 0, 65535).astype(np.int32)
