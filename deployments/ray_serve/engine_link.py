"""What a replica and the process of its engine say to each other over a socket.

A message is pickled, with large arrays beside the pickle: an image's embedding rows are not copied into it.
"""

import contextlib
import io
import pickle
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from deployments.stage_config import EncoderConfig
from deployments.tracing import Carrier, TracingConfig
from engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Setup:
    """First message to the engine's process.

    Attributes:
        engine: the model and how to run it.
        encoder: of the encoder in the process; None if it has none.
        tracing: where spans go.
        home: the name by which the replica reads answers itself, in place of the reader of a line.
    """

    engine: EngineConfig
    encoder: EncoderConfig | None
    tracing: TracingConfig | None
    home: str


@dataclass(frozen=True, slots=True)
class Call:
    """Runs a method of the :class:`~deployments.ray_serve.served_model.ServedModel` there.

    Attributes:
        number: unique.
        span: that the work belongs to.
    """

    number: int
    method: str
    args: tuple[Any, ...]
    span: Carrier


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancels a call, which then has no reply."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """Asks the engine's process to end in good order. If the socket closes without it, it ends at once."""


@dataclass(frozen=True, slots=True)
class Ready:
    """First message of the engine's process, but for its log: whether the model could be loaded.

    Attributes:
        line: address of its lines.
    """

    line: str = ""
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Result of a call, or the error that it raised."""

    number: int
    result: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line to ``reader`` was opened or closed."""

    reader: str
    open: bool


#: Bytes of the pickle, and the number of arrays beside it. The lengths of the arrays follow, then the pickle,
#: then the arrays.
_HEAD = struct.Struct("<QI")


def _packed(message: Any) -> list[Any]:
    arrays: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    lengths = struct.pack(f"<{len(views)}Q", *(view.nbytes for view in views))
    return [_HEAD.pack(len(data), len(views)) + lengths + data, *views]


class Link:
    """One end of the socket. One thread receives, any may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = io.BufferedReader(connection.makefile("rb", buffering=0), 1 << 16)
        self._turn = threading.Lock()

    def send(self, message: Any) -> None:
        """Send a message, waiting until its last byte is out.

        Raises:
            OSError: the other end is closed.
        """
        parts = _packed(message)
        with self._turn:
            for part in parts:
                self._connection.sendall(part)

    def receive(self) -> Any:
        """Wait for the next message.

        Raises:
            EOFError, OSError: the other end is closed.
        """
        length, count = _HEAD.unpack(self._read(_HEAD.size))
        lengths = struct.unpack(f"<{count}Q", self._read(8 * count))
        data = self._read(length)
        return pickle.loads(data, buffers=[self._read(each) for each in lengths])

    def close(self) -> None:
        """Close this end; whoever receives here or there gets an error."""
        # The other end may have been first.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, length: int) -> memoryview:
        # Not a bytearray, which would be filled with zeros first.
        found, done = memoryview(np.empty(length, np.uint8)), 0  # type: ignore[arg-type]
        while done < length:
            if not (count := self._stream.readinto(found[done:])):
                raise EOFError
            done += count
        return found
