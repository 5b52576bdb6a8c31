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
from contextlib import aclosing
from typing import Any

from deployments.errors import logger
from deployments.ray_serve.channel import Message, Outboxes

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
        self._connections: set[asyncio.Task[None]] = set()

    async def address(self) -> str:
        """The socket's address; empty if there can be none."""
        if self._address is None:
            # In a context of its own, not in that of the request that happens to be the first.
            self._address = contextvars.Context().run(asyncio.ensure_future, self._listen())
        return await asyncio.shield(self._address)

    async def _listen(self) -> str:
        # An abstract address: nothing is left in a file system, however this process ends.
        address = f"\0sightline-{uuid.uuid4().hex}"
        try:
            self._server = await asyncio.start_unix_server(self._connected, address)
        except OSError as error:
            logger.warning("updates go by gRPC alone, because there is no socket for them: %s", error)
            return ""
        return address

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # uvloop's sockets have no options of their own.
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as peer:
            _, user, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if user != os.getuid():
            writer.close()
            return
        task = asyncio.ensure_future(self._send(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send the updates of the reader whose name comes first, until it leaves."""
        try:
            name = (await reader.readline()).decode().strip()
            with self._outboxes.open(name, idle_s=None) as outbox:
                # It says nothing more: what comes is the end.
                left = asyncio.ensure_future(reader.read(1))
                left.add_done_callback(lambda _: outbox.close())
                try:
                    async with aclosing(outbox.messages()) as messages:
                        async for message in messages:
                            data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
                            writer.write(len(data).to_bytes(_LENGTH, "big") + data)
                            await writer.drain()
                finally:
                    left.cancel()
        except OSError:
            # The reader has gone.
            pass
        finally:
            writer.close()


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
