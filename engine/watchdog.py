"""The death of an engine: it can compute nothing more. It is noticed, whatever the engine's own threads wait
for, and told."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import SightlineError, Unavailable

logger = logging.getLogger(__name__)

#: Seconds between two looks.
_PERIOD_S = 0.5
#: Seconds that the threads of an engine that has died get to end.
_LAST_STEP_S = 5.0


class Mortal(ABC):
    """An engine that may die. It is shut down or dies, and stays so.

    Args:
        name: of the engine, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._closed = False
        self._failure: BaseException | None = None
        self._on_death: Callable[[], None] = lambda: None
        self._dying = threading.Lock()

    def when_dead(self, call: Callable[[], None]) -> None:
        """Have ``call`` called once the engine can compute nothing more; not because it was shut down.

        It may run on any thread, and runs at once if the engine has died.
        """
        with self._dying:
            if self._failure is None:
                self._on_death = call
                return
        call()

    def _stopped(self) -> Unavailable | None:
        """The error for requests of an engine that has died or was shut down; None if it runs."""
        if self._failure is not None:
            return Unavailable(f"The {self._name} has stopped: {self._failure}")
        return Unavailable(f"The {self._name} is shutting down.") if self._closed else None

    def _die(self, error: BaseException) -> None:
        """Note why the engine has died, and tell everyone; the first call alone counts."""
        with self._dying:
            if self._failure is not None:
                return
            self._failure = error
        logger.error("the %s has died", self._name, exc_info=error)
        stopped = self._stopped()
        assert stopped is not None
        self._fail_all(stopped)
        self._on_death()

    @abstractmethod
    def _fail_all(self, error: SightlineError) -> None:
        """Fail all open requests with ``error``."""

    def _join(self, thread: threading.Thread) -> None:
        """Wait until a thread of the engine has ended. A step that never returns can't be waited for."""
        thread.join(None if self._failure is None else _LAST_STEP_S)


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
