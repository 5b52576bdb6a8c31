"""Messages on a Unix socket between two processes of one host: each is pickled, behind its length.

The bytes of arrays stand before the pickle. They are sent from where they lie, not copied into it.
"""

import asyncio
import contextvars
import os
import pickle
import socket
import struct
import uuid
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from deployments.errors import logger

P = TypeVar("P", bound="LineEnd")

#: The most bytes of arrays in a request for an answer or for embedding rows, and of what images are sent as.
#: What comes behind them on the same line waits for 0.3 ms a MiB. Ray Serve and its store take twice the CPU
#: time for an image of six MiB of pixels.
MOST_BYTES = 16 << 20

#: What Linux tells of a peer: process, user and group.
_PEER = struct.Struct("3i")

#: A message's length, and the number and the sizes of its arrays; and the bytes of each.
_NUMBER = struct.Struct(">I")
_LENGTH = _NUMBER.size
#: Bytes that are read at a time, but for those of arrays and of long messages.
_ROOM = 64 << 10
#: Set in a length: the message has arrays.
_WITH_ARRAYS = 1 << 31


class Frames:
    """Cuts what comes into messages. The bytes of arrays come to where they stay: to copy an image's pixels
    once more costs as much as all other work for its message.

    The bytes that :meth:`room` has room for are put there first, and then :meth:`cut` is told how many.
    """

    def __init__(self) -> None:
        # What came and isn't read yet, but for arrays, is from start to end.
        self._buffer, self._start, self._end = bytearray(_ROOM), 0, 0
        # Of the message that is read: its arrays, the parts of them that are still to come, and the bytes of
        # its pickle, if its length is known.
        self._arrays: list[np.ndarray] = []
        self._missing: list[memoryview] = []
        self._pickled: int | None = None

    def room(self) -> memoryview:
        """Buffer for the next bytes; it is not empty."""
        return self._missing[0] if self._missing else memoryview(self._buffer)[self._end :]

    def cut(self, count: int) -> Iterator[Any]:
        """The messages that the next ``count`` bytes complete."""
        if not self._missing:
            self._end += count
        elif count < len(self._missing[0]):
            self._missing[0] = self._missing[0][count:]
        else:
            del self._missing[0]
        while self._has_message():
            assert self._pickled is not None
            begin, self._start = self._start, self._start + self._pickled
            arrays, self._arrays, self._pickled = self._arrays, [], None
            # Where it lies: a slice would be a copy.
            message = pickle.loads(memoryview(self._buffer)[begin : self._start], buffers=arrays)
            # This object keeps none of them.
            del arrays
            yield message
            del message
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > _ROOM and not self._pickled:
                self._buffer = bytearray(_ROOM)

    def _has_message(self) -> bool:
        """Return whether all of the next message has come."""
        if self._pickled is None:
            if not self._has(_LENGTH):
                return False
            (length,) = _NUMBER.unpack_from(self._buffer, self._start)
            if not length & _WITH_ARRAYS:
                self._start += _LENGTH
                self._pickled = length
            elif not self._has_arrays(length & ~_WITH_ARRAYS):
                return False
        assert self._pickled is not None
        return not self._missing and self._has(self._pickled)

    def _has_arrays(self, length: int) -> bool:
        """Return whether the sizes of the next message's arrays have come; if so, they begin.

        Args:
            length: of the message.
        """
        if not self._has(2 * _LENGTH):
            return False
        (count,) = _NUMBER.unpack_from(self._buffer, self._start + _LENGTH)
        if not self._has(head := (2 + count) * _LENGTH):
            return False
        sizes = struct.unpack_from(f">{count}I", self._buffer, self._start + 2 * _LENGTH)
        self._start += head
        self._pickled = length - (head - _LENGTH) - sum(sizes)
        self._begin_arrays(sizes)
        return True

    def _begin_arrays(self, sizes: Sequence[int]) -> None:
        # Not bytearrays, which would be filled with zeros first.
        self._arrays = [np.empty(size, np.uint8) for size in sizes]
        for array in self._arrays:
            part = array.data
            here = min(len(part), self._end - self._start)
            part[:here] = memoryview(self._buffer)[self._start : self._start + here]
            self._start += here
            if here < len(part):
                self._missing.append(part[here:])

    def _has(self, count: int) -> bool:
        """Return whether the next ``count`` bytes are there. If not, there is room for them."""
        here = self._end - self._start
        if here >= count:
            return True
        if self._start + count > len(self._buffer):
            former = self._buffer[self._start : self._end]
            if count > len(self._buffer):
                self._buffer = bytearray(count)
            self._buffer[:here] = former
            self._start, self._end = 0, here
        return False


def framed(message: Any) -> Sequence[bytes | memoryview]:
    """A message as :class:`Frames` cuts it off, in parts for a transport's ``writelines``. Arrays are parts
    of their own, which must not change until they are sent.

    Raises:
        OverflowError: it takes 2 GiB or more.
    """
    arrays: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
    if not arrays:
        return (_length(len(data)).to_bytes(_LENGTH, "big") + data,)
    parts = [array.raw() for array in arrays]
    sizes = [part.nbytes for part in parts]
    length = _length((1 + len(sizes)) * _LENGTH + sum(sizes) + len(data))
    head = struct.pack(f">{1 + len(sizes)}I", len(sizes), *sizes)
    return ((length | _WITH_ARRAYS).to_bytes(_LENGTH, "big") + head, *parts, data)


def _length(length: int) -> int:
    if length >= _WITH_ARRAYS:
        raise OverflowError(f"a message of {length} bytes is too long for a line")
    return length


class LineEnd(asyncio.BufferedProtocol):
    """An end of a line, which reads messages."""

    def __init__(self) -> None:
        self._frames = Frames()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        for message in self._frames.cut(nbytes):
            self._take(message)

    def _take(self, message: Any) -> None:
        """Take the next message. The line ends if this raises."""
        raise NotImplementedError


class ServedLine(LineEnd):
    """The end of a line that works for the other end. It reads what processes of this user say, no others.

    Args:
        connections: has this object while it is connected.

    Attributes:
        tasks: work that runs, by the name that the other end has given it.
    """

    def __init__(self, connections: set["ServedLine"]) -> None:
        super().__init__()
        self._connections = connections
        self.tasks: dict[Hashable, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if is_own_user(transport):
            self._connections.add(self)
        else:
            transport.close()

    def buffer_updated(self, nbytes: int) -> None:
        if self not in self._connections:
            return
        try:
            super().buffer_updated(nbytes)
        except Exception:
            logger.exception("what the other end of a line says can't be read")
            self._transport.abort()

    def _begin(self, name: Hashable, work: Coroutine[Any, Any, None]) -> None:
        # In a context of its own, for its span.
        task = self.tasks[name] = contextvars.Context().run(asyncio.ensure_future, work)
        task.add_done_callback(lambda _: self.tasks.pop(name))

    def _give_up(self, name: Hashable) -> None:
        # It may have ended meanwhile.
        if (task := self.tasks.get(name)) is not None:
            task.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        for task in self.tasks.values():
            task.cancel()


class LineServer:
    """Listens for lines to this process.

    Args:
        make: makes the end of a line; called with the set that has all connected ones.
        without: what it means that there can be no socket, for the log.
    """

    def __init__(self, make: Callable[[set[ServedLine]], ServedLine], without: str) -> None:
        self._make, self._without = make, without
        self._address: asyncio.Future[str] | None = None
        self._connections: set[ServedLine] = set()

    async def address(self) -> str:
        """The socket's address; empty if there can be none."""
        if self._address is None:
            # In a context of its own, not in that of the request that happens to be the first.
            self._address = contextvars.Context().run(asyncio.ensure_future, self._listen())
        return await asyncio.shield(self._address)

    async def _listen(self) -> str:
        # An abstract address: nothing is left in a file system, however this process ends.
        address, loop = f"\0sightline-{uuid.uuid4().hex}", asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(lambda: self._make(self._connections), address)
        except OSError as error:
            logger.warning("%s, because there is no socket for them: %s", self._without, error)
            return ""
        return address

    async def answered(self) -> None:
        """Return once all work has ended that was asked for by lines."""
        while running := [task for each in self._connections for task in each.tasks.values()]:
            await asyncio.wait(running)


async def connected(address: str, make: Callable[[], P]) -> P | None:
    """A protocol that is connected to the server at ``address``; None if there is no such server here."""
    try:
        connection = socket.socket(socket.AF_UNIX)
    except OSError:
        # This process has as many files open as it may.
        return None
    try:
        # uvloop doesn't connect to abstract addresses.
        connection.setblocking(False)
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    # Anyone may listen at an abstract address, and what comes is unpickled.
    if not _is_own(connection):
        connection.close()
        return None
    made = await asyncio.get_running_loop().create_unix_connection(make, sock=connection)
    return cast(tuple[Any, P], made)[1]


def is_own_user(transport: asyncio.BaseTransport) -> bool:
    """Return whether the process at the other end runs as this one's user."""
    # uvloop's sockets have no options of their own. The same descriptor: there may be no other left, and a
    # line that this end doesn't listen to would leave the other end waiting.
    peer = socket.socket(fileno=transport.get_extra_info("socket").fileno())
    try:
        return _is_own(peer)
    finally:
        peer.detach()


def _is_own(peer: socket.socket) -> bool:
    _, user, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return user == os.getuid()
