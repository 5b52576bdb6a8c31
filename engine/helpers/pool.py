"""Helper processes: hostile input may cost them any time or memory, or crash them, and they are replaced.

A :class:`Helper` runs a script that calls :func:`engine.helpers.child.serve`. Both sides send JSON lines over
a Unix socket, and an open file beside some of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import Overloaded, SightlineError, Unavailable

_START_SECONDS = 60.0
_PIECE = 1 << 16


class Helper:
    """One helper process.

    Args:
        script: what it runs.
        hello: the first message; its answer shows that the process works.
        task: what the process does, for errors: "decodes videos".
        environment: variables beside those of this process.

    Attributes:
        process_id: of the process.
        started: the answer to ``hello``.
        is_dead: it ended, or was too slow, and must be replaced.

    Raises:
        Unavailable: it can't be started.
    """

    def __init__(
        self, script: Path, hello: Mapping[str, Any], task: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", str(script)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
        self.process_id = self._popen.pid
        self.is_dead = False
        answer = self.ask(hello, _START_SECONDS)
        if answer is None:
            self.kill()
            raise Unavailable(f"The process that {task} could not be started.")
        self.started = answer[0]

    def ask(
        self, message: Mapping[str, Any], seconds: float, file: int | None = None
    ) -> tuple[dict[str, Any], int | None] | None:
        """The answer and the file that comes with it, which the caller closes.

        Args:
            file: descriptor of an open file that goes with the message.

        Returns:
            None if the process has died or takes more than ``seconds``.
        """
        deadline, data, files = time.monotonic() + seconds, b"", []
        try:
            sent = json.dumps(message).encode() + b"\n"
            self._wait_until(deadline)
            # The file goes with the last byte, so that it comes with the line's end.
            self._socket.sendall(sent[:-1])
            socket.send_fds(self._socket, [sent[-1:]], [] if file is None else [file])
            while not data.endswith(b"\n"):
                self._wait_until(deadline)
                piece, descriptors, _, _ = socket.recv_fds(self._socket, _PIECE, 1)
                files += descriptors
                if not piece:
                    raise ConnectionError
                data += piece
        except OSError:
            self.is_dead = True
            for descriptor in files:
                os.close(descriptor)
            return None
        return json.loads(data), files[0] if files else None

    def kill(self) -> None:
        """End the process."""
        self.is_dead = True
        self._socket.close()
        self._popen.kill()
        self._popen.wait()

    def _wait_until(self, deadline: float) -> None:
        """Let the next operation of the socket fail at ``deadline``."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        # No system's timer takes what stands for "forever".
        self._socket.settimeout(min(left, threading.TIMEOUT_MAX))


class HelperPool:
    """A small pool of helper processes, started when first needed and replaced when they die. Thread-safe.

    Args:
        start: starts a process.
        size: most processes, and tasks at a time.
        busy: the message of the refusal where all of them stay busy.
        queue_limit: seconds to wait for a free process.
    """

    def __init__(
        self, start: Callable[[], Helper], size: int, *, busy: str, queue_limit: float = 30.0
    ) -> None:
        self._start, self._size, self._busy, self._queue_limit = start, size, busy, queue_limit
        # Last in, first out: a second process starts only when two tasks come at once.
        self._idle: queue.LifoQueue[Helper | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    @contextlib.contextmanager
    def helper(self) -> Iterator[Helper]:
        """Hold a process for one task. One that is dead at the end is replaced.

        Raises:
            Overloaded: all processes stay busy.
            Unavailable: no process can be started.
        """
        try:
            helper = self._idle.get(timeout=self._queue_limit)
        except queue.Empty:
            raise Overloaded(self._busy) from None
        try:
            if helper is None:
                helper = self._start()
            yield helper
        finally:
            if helper is not None and helper.is_dead:
                helper.kill()
                helper = None
            self._idle.put(helper)

    def close(self) -> None:
        """End the processes; tasks that run are waited for."""
        for _ in range(self._size):
            helper = self._idle.get()
            if helper is not None:
                helper.kill()
        for _ in range(self._size):
            self._idle.put(None)


class Task:
    """Questions to one process about one input, which have a time limit together.

    Args:
        helper: the process.
        seconds: for all answers together.
        failed: makes the error of a reason, which goes on from "it ".
        exhausted: the reason where the process has died or the time is over.
    """

    def __init__(
        self, helper: Helper, seconds: float, failed: Callable[[str], SightlineError], exhausted: str
    ) -> None:
        self._helper, self._seconds, self._failed, self._exhausted = helper, seconds, failed, exhausted

    def ask(self, message: Mapping[str, Any], file: int | None = None) -> tuple[dict[str, Any], int | None]:
        """The answer and its file as :meth:`Helper.ask` gives them.

        Raises:
            SightlineError: made by ``failed``: the answer is an error, or there is none.
        """
        started = time.monotonic()
        found = self._helper.ask(message, self._seconds, file)
        self._seconds -= time.monotonic() - started
        if found is None:
            raise self._failed(self._exhausted)
        if "error" in found[0]:
            raise self._failed(found[0]["error"])
        return found
