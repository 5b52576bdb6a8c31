"""Notices that an engine can compute nothing more, whatever its own threads wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import SightlineError, Unavailable

#: Seconds between two looks.
_PERIOD_S = 0.5


class Watchdog:
    """Watches one thread's steps, and the processes that they need, from a thread of its own.

    Args:
        check: raises Unavailable if no step can be computed any more.
        limit_s: seconds that a step may take: one that takes longer is assumed never to return.
        on_death: called once, with the reason, from the watchdog's thread.
    """

    def __init__(
        self, check: Callable[[], None], limit_s: float, on_death: Callable[[SightlineError], None]
    ) -> None:
        self._check, self._limit_s, self._on_death = check, limit_s, on_death
        self._began: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a step of the watched thread."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def close(self) -> None:
        """Stop watching; may be called repeatedly, and from any thread."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(_PERIOD_S, self._limit_s / 4)):
            try:
                self._check()
                began = self._began
                if began is not None and time.monotonic() - began > self._limit_s:
                    raise Unavailable(f"A step has not returned for {self._limit_s:g} seconds.")
            except SightlineError as error:
                self._on_death(error)
                return
