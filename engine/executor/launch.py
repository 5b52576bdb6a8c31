"""Starts the processes of the ranks beyond 0, on this machine or, with another launcher, elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

_GRACE_S = 5.0

#: Begins the names of the folders where ranks meet.
_MEETING_PLACE = "sightline-meeting-"


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


class _MeetingPlace:
    """A folder where the ranks of this host meet, until it is cleared, collected, or the interpreter ends.

    It is locked meanwhile. A process that is killed leaves its folder without the lock: the next one to start
    removes it.
    """

    def __init__(self) -> None:
        _remove_left_places()
        self.path, lock = _locked_folder()
        self.clear = weakref.finalize(self, _remove_folder, self.path, lock)


def _locked_folder() -> tuple[str, int]:
    """A new folder, and the file descriptor that holds its lock."""
    while True:
        # Mode 0700: whoever can use the folder is trusted.
        path = tempfile.mkdtemp(prefix=_MEETING_PLACE)
        # Before it is locked another process may take it for one that was left.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(path):
                return path, lock
            os.close(lock)


def _remove_folder(path: str, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_left_places() -> None:
    """Remove the folders of this user's processes that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_MEETING_PLACE}*"):
        # It may be in use, or be gone meanwhile.
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


class LocalLauncher:
    """Starts processes on this machine. They end with this process, because their standard input closes."""

    def __init__(self) -> None:
        self._place: _MeetingPlace | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        if self._place is None:
            self._place = _MeetingPlace()
        return f"file://{self._place.path}/rendezvous"

    def ranks_here(self, size: int) -> int:
        return size

    def start(self, size: int) -> list[Connection]:
        connections = []
        folder = "" if self._place is None else self._place.path
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
        if self._place is not None:
            self._place.clear()
