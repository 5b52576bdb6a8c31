"""Threads that help with a large image. At most a given number of a process's threads compute at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock


class Crew:
    """Shares the parts of one image's work among threads that nobody else needs.

    A thread that prepares an image is a member while it does so. Only a lone member has helpers, up to
    ``size - 1`` of them: where several images are prepared at a time, helpers would hold each other up. So a
    process hardly ever computes with more threads than its images would take without helpers.

    Args:
        size: threads that may compute at a time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._members = self._helping = 0
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
            self._members += 1
        token = _crew.set(self)
        try:
            yield
        finally:
            _crew.reset(token)
            with self._lock:
                self._members -= 1

    def share(self, work: Callable[[int, int], None], most: int) -> None:
        """Call ``work(part, parts)`` for each part; ``parts`` is ``most``, or less with fewer free threads.

        Raises:
            BaseException: what a part raised, once none of them is at work any more.
        """
        with self._taken(most - 1) as count:
            parts = [
                self._helpers.submit(work, part, count + 1)
                for part in range(1, count + 1)
                if self._helpers is not None
            ]
            try:
                work(0, count + 1)
            finally:
                wait(parts)
            for part in parts:
                part.result()

    @contextmanager
    def _taken(self, most: int) -> Iterator[int]:
        with self._lock:
            free = self._size - self._members - self._helping if self._members == 1 else 0
            count = max(0, min(most, free))
            self._helping += count
        try:
            yield count
        finally:
            with self._lock:
                self._helping -= count


_crew: ContextVar[Crew | None] = ContextVar("crew", default=None)


def crew() -> Crew | None:
    """The crew that the calling thread is a member of."""
    return _crew.get()
