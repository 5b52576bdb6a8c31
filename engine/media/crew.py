"""Threads that help with large images. At most a given number of a process's threads compute at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock


class Crew:
    """Shares the parts of one image's work among threads that nobody else needs.

    A thread that prepares an image is a member while it does so. Members and helpers together are at most
    ``size``: an image alone gets ``size - 1`` helpers, and none where ``size`` images are prepared at a time.
    So a process never computes with more threads than its images would take without helpers.

    Args:
        size: threads that may compute at a time; more members than that have no helpers.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._lock = Lock()
        # Threads start when there is work for them, and end with this object.
        self._helpers = ThreadPoolExecutor(size - 1, "helper") if size > 1 else None

    @contextmanager
    def member(self) -> Iterator[None]:
        """Make the calling thread a member: :func:`crew` gives it this one. A member may come again."""
        if _crew.get() is self:
            yield
            return
        with self._lock:
            self._free -= 1
        token = _crew.set(self)
        try:
            yield
        finally:
            _crew.reset(token)
            with self._lock:
                self._free += 1

    @contextmanager
    def _taken(self, most: int) -> Iterator[int]:
        with self._lock:
            count = max(0, min(most, self._free))
            self._free -= count
        try:
            yield count
        finally:
            with self._lock:
                self._free += count

    def share(self, work: Callable[[int, int], None], most: int) -> None:
        """Call ``work(part, parts)`` for each part, with at most ``most`` of the threads that are free now.

        Raises:
            BaseException: what a part raised, once none of them is at work any more.
        """
        with self._taken(most - 1) as count:
            parts = (
                []
                if self._helpers is None
                else [self._helpers.submit(work, part, count + 1) for part in range(1, count + 1)]
            )
            try:
                work(0, count + 1)
            finally:
                wait(parts)
            for part in parts:
                part.result()


_crew: ContextVar[Crew | None] = ContextVar("crew", default=None)


def crew() -> Crew | None:
    """The crew that the calling thread is a member of."""
    return _crew.get()
