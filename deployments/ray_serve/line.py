"""A line between two processes of one host: a Unix socket that carries a replica's channel to an ingress.

A message of a line costs a tenth of one of a gRPC stream. A line isn't a request for Ray Serve, so it stays
open: a burst of answers after a pause finds it open.
"""

import asyncio
import contextvars
import os
import pickle
import socket
import struct
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

from deployments.errors import logger
from deployments.ray_serve.channel import Message, Outbox, Outboxes

#: What Linux tells of a peer: process, user and group.
_PEER = struct.Struct("3i")

#: Bytes of a message's length, which comes before it.
_LENGTH = 4


class Lines:
    """The replica's end of lines.

    Args:
        outboxes: of the replica; a line is one that stays open.
    """

    def __init__(self, outboxes: Outboxes) -> None:
        self._outboxes = outboxes
        self._address: asyncio.Future[str] | None = None
        self._connections: set[_Sender] = set()

    async def address(self) -> str:
        """The socket's address; empty if there can be none."""
        if self._address is None:
            # In a context of its own, not in that of the request that happens to be the first.
            self._address = contextvars.Context().run(asyncio.ensure_future, self._listen())
        return await asyncio.shield(self._address)

    async def _listen(self) -> str:
        # An abstract address: nothing is left in a file system, however this process ends.
        address = f"\0sightline-{uuid.uuid4().hex}"
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(
                lambda: _Sender(self._outboxes, self._connections), address
            )
        except OSError as error:
            logger.warning("updates go by gRPC alone, because there is no socket for them: %s", error)
            return ""
        return address


class _Sender(asyncio.Protocol):
    """The replica's end of one line: sends the updates of the reader whose name comes first, until it leaves.

    No task takes part, since a step of the engine has something to send on each line.

    Args:
        outboxes: of the replica.
        connections: has this object while it is connected.
    """

    def __init__(self, outboxes: Outboxes, connections: set["_Sender"]) -> None:
        self._outboxes, self._connections = outboxes, connections
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._open = ExitStack()
        self._outbox: Outbox | None = None
        self._due = self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        # uvloop's sockets have no options of their own.
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as peer:
            _, user, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if user != os.getuid():
            transport.close()
            return
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self not in self._connections:
            return
        self._received += data
        name, newline, more = self._received.partition(b"\n")
        if self._outbox is None and newline:
            self._outbox = self._open.enter_context(self._outboxes.open(name.decode(), idle_s=None))
            self._outbox.when_ready(self._soon)
        if more:
            # It has nothing more to say.
            self.close()

    def close(self) -> None:
        """End the line."""
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        if self._outbox is not None:
            self._outbox.close()
        self._open.close()

    def pause_writing(self) -> None:
        # Meanwhile updates are merged: a slow reader costs no memory.
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._soon()

    def _soon(self) -> None:
        """Send when all updates of a step are there."""
        if not (self._due or self._paused):
            self._due = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._due = False
        if self._outbox is None or self._transport.is_closing():
            return
        try:
            for message in self._outbox.take():
                data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
                self._transport.write(len(data).to_bytes(_LENGTH, "big") + data)
        except Exception:
            # What was taken is lost: the answers must end, as with any line that breaks.
            logger.exception("updates can't be sent")
            self._transport.abort()
            return
        if self._outbox.ended:
            self.close()


class _Frames(asyncio.Protocol):
    """Cuts what comes into messages.

    Args:
        take: called with each message.

    Attributes:
        ended: done when the connection ends.
    """

    def __init__(self, take: Callable[[Message], None]) -> None:
        self._take = take
        self._received = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        received, start = self._received, 0
        received += data
        while len(received) >= (begin := start + _LENGTH):
            end = begin + int.from_bytes(received[start:begin], "big")
            if len(received) < end:
                break
            self._take(pickle.loads(received[begin:end]))
            start = end
        del received[:start]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def follow(address: str, name: str, take: Callable[[Message], None]) -> bool:
    """Read a line to its end.

    Args:
        address: see :meth:`Lines.address`.
        name: of the reader.
        take: called with each message.

    Returns:
        False if there is no such line, as for a replica on another host.
    """
    connected = socket.socket(socket.AF_UNIX)
    try:
        # uvloop doesn't connect to abstract addresses.
        connected.setblocking(False)
        connected.connect(address)
    except OSError:
        connected.close()
        return False
    made: tuple[Any, _Frames] = await asyncio.get_running_loop().create_unix_connection(
        lambda: _Frames(take), sock=connected
    )
    transport, frames = made
    try:
        transport.write(name.encode() + b"\n")
        await frames.ended
    finally:
        transport.close()
    return True
