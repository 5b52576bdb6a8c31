"""Rank 0's connections to the other ranks: messages to all, replies from each, and notice of a dead rank."""

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
    """Ranks ``1 .. size - 1``. When one has died, the others are ended too.

    Args:
        launcher: starts and ends their processes.
        size: number of ranks, rank 0 included.
    """

    def __init__(self, launcher: Launcher, size: int) -> None:
        self._launcher = launcher
        self._connections: list[Connection] = launcher.start(size)
        self._replies: list[deque[Any]] = [deque() for _ in self._connections]
        self._error: SightlineError | None = None
        self._on_loss: Callable[[], None] | None = None
        # Guards all attributes above against the listener thread.
        self._changed = threading.Condition()
        self._listener = threading.Thread(target=self._listen, name="engine-ranks", daemon=True)
        self._listener.start()

    def send(self, message: Any) -> None:
        """Send the same message to every rank.

        Raises:
            OSError: a rank has died.
        """
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for connection in self._connections:
            connection.send_bytes(data)

    def send_each(self, messages: Sequence[Any]) -> None:
        """Send one message to each rank, in the order of ranks; errors as :meth:`send`."""
        for connection, message in zip(self._connections, messages, strict=True):
            connection.send(message)

    def receive(self) -> list[Any]:
        """Wait for the next reply of every rank; return them in the order of ranks.

        Raises:
            Unavailable: a rank has died.
            SightlineError: a rank has raised it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or all(self._replies))
            self.check()
            return [replies.popleft() for replies in self._replies]

    def check(self) -> None:
        """Raise unless all ranks run.

        Raises:
            Unavailable: a rank has died, or the ranks were stopped.
            SightlineError: a rank has raised it.
        """
        if self._error is not None:
            raise copy.copy(self._error)

    def wait_for_loss(self, timeout_s: float) -> bool:
        """Return whether a rank has failed, or fails within ``timeout_s`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._error is not None, timeout_s)

    def when_lost(self, free: Callable[[], None]) -> None:
        """Register a callback for the failure of a rank, called from any thread.

        ``free`` must end the operations that wait for that rank.
        """
        with self._changed:
            self._on_loss = free

    def give_up(self, error: SightlineError) -> None:
        """Kill all ranks, which may be at different steps; :meth:`check` raises ``error`` from now on."""
        with self._changed:
            if self._error is not None:
                return
            self._error = error
            self._launcher.kill()
            if self._on_loss is not None:
                self._on_loss()
            self._changed.notify_all()
        logger.error("%s", error)

    def stop(self) -> None:
        """End all ranks, and return when their processes have ended; may be called repeatedly."""
        with self._changed:
            self._error = self._error or Unavailable("The engine's ranks were stopped.")
            self._changed.notify_all()
        self._launcher.stop()
        # The garbage collector may call this on the listener thread itself.
        if self._listener is not threading.current_thread():
            self._listener.join()
        for connection in self._connections:
            connection.close()

    def _listen(self) -> None:
        while True:
            for connection in wait(self._connections):
                index = self._connections.index(connection)  # type: ignore[arg-type]
                try:
                    reply = self._connections[index].recv()
                except (EOFError, OSError):
                    reply = Unavailable(f"Rank {index + 1} of the language model has died.")
                if isinstance(reply, SightlineError):
                    self.give_up(reply)
                    return
                with self._changed:
                    self._replies[index].append(reply)
                    self._changed.notify_all()
