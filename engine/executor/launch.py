"""Starts the processes of the ranks beyond 0, on this machine or, with another launcher, elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol

_GRACE_S = 5.0


class Launcher(Protocol):
    """Starts and ends the processes of one group.

    Each runs :func:`engine.executor.worker.serve` on its end of a connection, and then exits.
    """

    @property
    def address(self) -> str:
        """Address of the rendezvous; see :meth:`engine.distributed.group.TorchGroup.join`."""

    def ranks_here(self, size: int) -> int:
        """Number of the ``size`` ranks that run on this host, rank 0 included."""

    def start(self, size: int) -> list[Connection]:
        """Start ranks ``1 .. size - 1``; return the connections to them, in this order."""

    def kill(self) -> None:
        """Kill the processes; may be called from any thread, and repeatedly."""

    def stop(self) -> None:
        """End the processes, and return when they have ended; may be called repeatedly."""

    def clear(self) -> None:
        """Remove the rendezvous folder, once all ranks have ended; may be called repeatedly."""


def fresh_interpreter(module: str, descriptor: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a process that runs ``module`` with an inherited file descriptor.

    It finds the modules that this process finds. ``multiprocessing`` would run the caller's script again.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-P", "-m", module, str(descriptor)]
    return command, {**os.environ, "PYTHONPATH": path}


def start_rank(connection: Connection, ranks_here: int, folder: str = "") -> subprocess.Popen[bytes]:
    """Start a process that runs :func:`engine.executor.worker.serve` on ``connection``; close that here then.

    The process ends with this one, however this one ends: its standard input closes.

    Args:
        ranks_here: ranks of this host. Each gets its share of this process's threads, whether their number
            comes from the machine, from ``OMP_NUM_THREADS`` or from ``torch.set_num_threads``.
        folder: removed when this process ends, in case it was killed and could not; none if empty.
    """
    # Not above: processes that only build an application know launchers, and have no use for torch.
    import torch

    command, environment = fresh_interpreter("engine.executor.worker", connection.fileno())
    threads = max(1, torch.get_num_threads() // ranks_here)
    return subprocess.Popen(
        [*command, folder],
        stdin=subprocess.PIPE,
        env={**environment, "OMP_NUM_THREADS": str(threads)},
        pass_fds=[connection.fileno()],
        # Ctrl-C in a terminal is for the engine's own process.
        start_new_session=True,
    )


def end_ranks(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes of ranks, and return when they are gone; may be called repeatedly."""
    processes = list(processes)
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class LocalLauncher:
    """Starts processes on this machine. They end with this process, because their standard input closes."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        if self._folder is None:
            # Mode 0700: whoever can use the folder is trusted. Removed with this object at the latest.
            self._folder = tempfile.TemporaryDirectory(prefix="sightline-ranks-", ignore_cleanup_errors=True)
        return f"file://{self._folder.name}/rendezvous"

    def ranks_here(self, size: int) -> int:
        return size

    def start(self, size: int) -> list[Connection]:
        connections = []
        folder = "" if self._folder is None else self._folder.name
        for _ in range(1, size):
            ours, theirs = Pipe()
            connections.append(ours)
            with theirs:
                self._processes.append(start_rank(theirs, size, folder))
        return connections

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def stop(self) -> None:
        end_ranks(self._processes)

    def clear(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
