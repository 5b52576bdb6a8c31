"""Ranks as threads of this process: they start at once, where processes take seconds."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from engine.executor import worker


class ThreadLauncher:
    """A :class:`engine.executor.launch.Launcher` for ranks on the CPU."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="thread-ranks-", ignore_cleanup_errors=True)
        self._threads: list[threading.Thread] = []
        self._connections: list[Connection] = []

    @property
    def address(self) -> str:
        return f"file://{self._folder.name}/rendezvous"

    def ranks_here(self, size: int) -> int:
        return size

    def start(self, size: int) -> list[Connection]:
        ours = []
        for rank in range(1, size):
            near, far = Pipe()
            ours.append(near)
            self._connections.append(far)
            # A test's process must be able to end whatever its ranks wait for.
            thread = threading.Thread(
                target=worker.serve, args=(far, False), name=f"rank-{rank}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        return ours

    def kill(self) -> None:
        """Let every rank read the end of its connection."""
        for connection in self._connections:
            if not connection.closed:
                with socket.socket(fileno=os.dup(connection.fileno())) as end:
                    end.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.kill()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank did not end"
        for connection in self._connections:
            connection.close()

    def clear(self) -> None:
        self._folder.cleanup()
