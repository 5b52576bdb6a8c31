"""Pixels in Pillow's own memory, from which they can be copied to the device at once. PIL and numpy only.

Pillow keeps four bytes for a pixel of an RGB image, of which the last one means nothing. It shows its memory
through Arrow's C data interface (https://arrow.apache.org/docs/format/CDataInterface.html).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from PIL import Image

from engine.media.image_ops import rgb_array


class _ArrowArray(ctypes.Structure):
    """``struct ArrowArray``, up to its last member that is read here."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Memory:
    """Describes an image's memory to numpy, and keeps it alive.

    Args:
        capsule: of an array of lists of four bytes.
        size: ``(width, height)``.
    """

    def __init__(self, capsule: Any, size: tuple[int, int]) -> None:
        self._capsule = capsule
        array = ctypes.cast(_pointer(capsule, b"arrow_array"), ctypes.POINTER(_ArrowArray)).contents
        # Of bytes in place the first buffer says which are missing, and the second holds them.
        address = array.children[0].contents.buffers[1]
        shape = (size[1], size[0], 4)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": shape, "data": (address, True)}


def shared_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image as uint8 ``(height, width, 4)``, which change with the image; or, if its
    memory is not in one piece, a copy ``(height, width, 3)``. Neither is writable."""
    image.load()
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:
        return rgb_array(image)
    return np.asarray(_Memory(capsule, image.size))


def packed_pixels(pixels: np.ndarray) -> np.ndarray:
    """Pixels of three or four bytes as uint8 ``(height, width, 3)``, contiguous."""
    if pixels.shape[-1] == 3:
        return pixels
    height, width, _ = pixels.shape
    image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
    return np.frombuffer(image.tobytes("raw", "RGB"), np.uint8).reshape(height, width, 3)
