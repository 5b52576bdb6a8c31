"""Opens files of requests in processes that may be killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import MediaError, Unavailable
from engine.helpers.files import file_of
from engine.helpers.pool import Helper, HelperPool, Task

#: Address space of a process beside what it hands over: libraries, the file, and what is made of it.
_MEMORY = 2 << 30


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of files.

    Attributes:
        name: for errors: "video".
        script: what a process runs; it takes the message ``memory`` first, then ``open`` with a file.
        package: what the script imports to read such files, for servers that lack it.
        smaller: what a caller may send or ask for where a file takes too long: "send a shorter one".
    """

    name: str
    script: Path
    package: str
    smaller: str


class FilePool:
    """Reads files of one kind in a small pool of processes. Thread-safe.

    Args:
        kind: of the files.
        seconds: most seconds that all answers about one file take together.
        processes: files read at a time.
        queue_limit: seconds to wait for a free process.
    """

    def __init__(self, kind: FileKind, seconds: float, *, processes: int, queue_limit: float) -> None:
        self._kind, self._seconds = kind, seconds
        busy = f"Too many {kind.name}s are being read; try again later."
        self._pool = HelperPool(self._start, processes, busy=busy, queue_limit=queue_limit)

    @contextlib.contextmanager
    def open(self, data: bytes, where: str, message: Any) -> Iterator[OpenFile]:
        """Open a file.

        Args:
            data: the file's bytes.
            where: the field of the request, for errors.
            message: goes with the message ``open``.

        Raises:
            MediaError: the file can't be read.
            Overloaded: all processes are busy with other files.
            Unavailable: no process can be started.
        """
        kind = self._kind
        if find_spec(kind.package) is None:
            raise Unavailable(
                f"This server reads no {kind.name}s: its package {kind.package} is not installed."
            )
        with self._pool.helper() as helper:
            yield OpenFile(helper, kind, self._seconds, data, where, message)

    def close(self) -> None:
        """End the processes; files that are being read are waited for."""
        self._pool.close()

    def _start(self) -> Helper:
        return Helper(self._kind.script, {"memory": _MEMORY}, f"reads {self._kind.name}s")


class OpenFile:
    """A file that a process has opened. See :class:`FilePool` for the arguments.

    Attributes:
        where: the field of the request.
        opened: the answer to the message ``open``.
        process_id: of the process.
    """

    def __init__(
        self, helper: Helper, kind: FileKind, seconds: float, data: bytes, where: str, message: Any
    ) -> None:
        self.where, self.process_id, self._kind = where, helper.process_id, kind
        exhausted = f"it takes more than {seconds:g} seconds or more memory than allowed; {kind.smaller}"
        self._task = Task(helper, seconds, self.failed, exhausted)
        with file_of(data) as file:
            self.opened, _ = self._task.ask({"open": message}, file)

    def ask(self, message: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
        """The answer of the process, and the file that comes with it, which the caller closes.

        Raises:
            MediaError: the answer is an error, or there is none.
        """
        return self._task.ask(message)

    def failed(self, reason: str) -> MediaError:
        """The error of a ``reason`` that goes on from "it "."""
        return MediaError(f"{self.where}: the {self._kind.name} can't be read: {reason}.", param=self.where)
