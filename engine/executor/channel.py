"""Rank 0's lines to the other ranks: messages to all, replies from each, and notice of a death."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from engine.errors import SightlineError, Unavailable
from engine.executor.launch import Launcher

logger = logging.getLogger(__name__)


class Workers:
    """Ranks ``1 .. size - 1``. They are lost together: when one has died, the others are ended.

    Args:
        launcher: starts and ends their processes.
        size: ranks, 0 included.
    """

    def __init__(self, launcher: Launcher, size: int) -> None:
        self._launcher = launcher
        self._lines: list[Connection] = launcher.start(size)
        self._replies: list[deque[Any]] = [deque() for _ in self._lines]
        self._error: SightlineError | None = None
        self._on_loss: Callable[[], None] | None = None
        # Guards all of the above against the listener.
        self._news = threading.Condition()
        self._listener = threading.Thread(target=self._listen, name="engine-ranks", daemon=True)
        self._listener.start()

    def send(self, message: Any) -> None:
        """The same message to each.

        Raises:
            OSError: one has died.
        """
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for line in self._lines:
            line.send_bytes(data)

    def send_each(self, messages: Sequence[Any]) -> None:
        """To each its own; errors as :meth:`send`."""
        for line, message in zip(self._lines, messages, strict=True):
            line.send(message)

    def receive(self) -> list[Any]:
        """The next reply of each, in the order of ranks.

        Raises:
            Unavailable: one has died.
            SightlineError: what one has raised.
        """
        with self._news:
            self._news.wait_for(lambda: self._error is not None or all(self._replies))
            self.check()
            return [replies.popleft() for replies in self._replies]

    def check(self) -> None:
        """
        Raises:
            Unavailable: they are lost, or were stopped.
            SightlineError: one has raised it.
        """
        if self._error is not None:
            raise copy.copy(self._error)

    def wait_for_loss(self, timeout_s: float) -> bool:
        """Whether they are lost, or are within ``timeout_s``."""
        with self._news:
            return self._news.wait_for(lambda: self._error is not None, timeout_s)

    def when_lost(self, free: Callable[[], None]) -> None:
        """Have ``free`` called, from any thread, once one is lost: it must end what waits for it."""
        with self._news:
            self._on_loss = free

    def give_up(self, error: SightlineError) -> None:
        """End all, because they are no longer in step; :meth:`check` raises ``error`` from now on."""
        with self._news:
            if self._error is not None:
                return
            self._error = error
            self._launcher.kill()
            if self._on_loss is not None:
                self._on_loss()
            self._news.notify_all()
        logger.error("%s", error)

    def stop(self) -> None:
        """End all, and return when they are gone; may be called repeatedly."""
        with self._news:
            self._error = self._error or Unavailable("The engine's ranks were stopped.")
            self._news.notify_all()
        self._launcher.stop()
        # Garbage is collected on any thread, so that this may be the listener's own.
        if self._listener is not threading.current_thread():
            self._listener.join()
        for line in self._lines:
            line.close()

    def _listen(self) -> None:
        while True:
            for line in wait(self._lines):
                index = self._lines.index(line)  # type: ignore[arg-type]
                try:
                    reply = self._lines[index].recv()
                except (EOFError, OSError):
                    reply = Unavailable(f"Rank {index + 1} of the language model has died.")
                if isinstance(reply, SightlineError):
                    self.give_up(reply)
                    return
                with self._news:
                    self._replies[index].append(reply)
                    self._news.notify_all()
