"""What the process's garbage collector does while a model needs time or the device for itself."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Collector:
    """The process's garbage collector. Threads may use it at the same time, as each may have a model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses = self._pauses = 0
        self._frozen = self._collects = False

    @contextmanager
    def young_garbage_only(self) -> Iterator[None]:
        """Keep the collector from traversing objects that exist already. After a model is loaded each
        traversal takes tens of milliseconds, while the device waits."""
        with self._lock:
            self._uses += 1
            if self._uses == 1 and not self._frozen:
                # The caller may have frozen objects, and may not want them unfrozen. To count them takes as
                # long as a traversal: they are counted until some are found.
                self._frozen = gc.get_freeze_count() > 0
                if not self._frozen:
                    gc.freeze()
        try:
            yield
        finally:
            with self._lock:
                self._uses -= 1
                if not self._uses and not self._frozen:
                    gc.unfreeze()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the collector from running. It runs again when no thread needs that any more, if it did."""
        with self._lock:
            self._pauses += 1
            if self._pauses == 1:
                self._collects = gc.isenabled()
                gc.disable()
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                if not self._pauses and self._collects:
                    gc.enable()


COLLECTOR = Collector()
