"""Keeps memory that was freed for the next message of the same kind."""

import ctypes
import os

from deployments.ray_serve.frames import MOST_BYTES

#: glibc's numbers of what ``mallopt`` sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

#: Larger pieces go back to the kernel when they are freed. A message takes some more than its arrays.
_LARGEST_PIECE = 2 * MOST_BYTES
#: The most free bytes at the end of the heap that stay there.
_MOST_KEPT = 64 << 20


def keep_freed_memory() -> None:
    """Have the C library keep freed memory of the size of an image's pixels.

    By default glibc gives pieces of that size back to the kernel one moment and asks for them the next. Each
    image then brings hundreds of page faults to every process that its pixels come through, which cost a
    third of that process's work for the image.

    Nothing changes with another C library, or where the environment says what glibc is to do.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_PIECE)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
