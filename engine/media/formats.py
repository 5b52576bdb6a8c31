"""The formats of images that are read: Pillow's own, and those of optional packages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Literal

from PIL import features

#: Pillow's names of the formats.
ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JXL"]


def readable(formats: Iterable[ImageFormat]) -> tuple[str, ...]:
    """Those of ``formats`` that this process can read. Optional packages are loaded if they are installed."""
    return tuple(name for name in formats if _can_read(name))


@cache
def _can_read(name: str) -> bool:
    load = _OPTIONAL.get(name)
    if load is None:
        return True
    try:
        return load()
    except ImportError:
        return False


def _heif() -> bool:
    # Grids of a photo are one image here, and thumbnails aren't read.
    import_module("pillow_heif").register_heif_opener(thumbnails=False)
    return True


def _jxl() -> bool:
    import_module("pillow_jxl")
    return True


def _avif() -> bool:
    return bool(features.check("avif"))


_OPTIONAL: dict[str, Callable[[], bool]] = {"AVIF": _avif, "HEIF": _heif, "JXL": _jxl}
