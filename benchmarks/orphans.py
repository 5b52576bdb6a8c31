"""Ends the processes that outlive the program that started them.

A program that is killed, or whose terminal is closed, ends nothing that it has started: a server that it runs
would go on for ever. So a process of its own, which runs this file, waits for its end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

#: Environment variable by which the processes are found: each inherits it from the one that started it.
_NAME = "SIGHTLINE_STARTED_BY"


@cache
def end_with_this_process() -> subprocess.Popen[bytes]:
    """Once this process has ended, have all killed that it has started from now on, and all that these have.

    It does not matter how it ends, nor what parent and session they have then. One of them may call this too.
    Nothing is killed where there is no /proc, nor as long as there is a fork of this process that has run no
    other program: it counts as this process.

    Returns:
        The process that waits for that. It ends when all others have.
    """
    mark = f"{os.getpid()}-{os.urandom(8).hex()}"
    # Nobody kills it before it has done its work: it has no mark, not even another program's, nor a terminal.
    command = [sys.executable, "-I", "-S", __file__, f"{_NAME}={mark}"]
    waiting = subprocess.Popen(command, stdin=subprocess.PIPE, env={}, cwd="/", start_new_session=True)
    os.environ[_NAME] = mark
    return waiting


def _kill_all(line: bytes) -> None:
    """Kill the processes that have ``line`` in their environment, until there are none."""
    while found := list(_processes(line)):
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _processes(line: bytes) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        # It may be another user's, or have ended meanwhile.
        with suppress(OSError):
            if line in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


if __name__ == "__main__":
    # It ends with the program and its forks: no program that they run has its other end.
    sys.stdin.buffer.read()
    _kill_all(sys.argv[1].encode())
