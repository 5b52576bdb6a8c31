"""Bytes and arrays as files in memory, which processes hand to each other."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np


@contextmanager
def file_of(data: bytes) -> Iterator[int]:
    """The descriptor of a file with ``data``, at its beginning; closed at the end of the block."""
    descriptor = written([data])
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def written(pieces: Sequence[bytes | np.ndarray]) -> int:
    """The descriptor of a new file with ``pieces`` one behind the other; the caller closes it."""
    descriptor = os.memfd_create("media")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).data if isinstance(piece, np.ndarray) else piece)
    return descriptor


def taken(descriptor: int, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array in a file, copied out of it. The file is closed."""
    try:
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
            return np.frombuffer(mapped, np.uint8).reshape(shape).copy()
    finally:
        os.close(descriptor)
