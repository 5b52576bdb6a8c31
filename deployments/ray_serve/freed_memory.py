"""Keeps memory that was freed for the next message of the same kind."""

import ctypes
import os

#: glibc's numbers of what ``mallopt`` sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

#: Larger pieces go back to the kernel when they are freed. It is the most that glibc takes, and to which it
#: goes by itself.
_LARGEST_PIECE = 32 << 20
#: The most free bytes that stay at the end of each heap: threads that allocate at the same time have heaps of
#: their own.
_MOST_KEPT = 64 << 20


def keep_freed_memory() -> None:
    """Have the C library keep freed memory of the size of an image's pixels.

    By default glibc gives pieces of that size back to the kernel one moment and asks for them the next. Each
    image then brings hundreds of page faults to every process that its pixels come through, which cost a
    third of that process's work for the image.

    Nothing changes with another C library, or where the environment says what glibc is to do.
    """
    said = "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ
    if said or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_PIECE)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
