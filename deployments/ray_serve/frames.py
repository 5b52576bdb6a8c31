"""Messages on a Unix socket between two processes of one host: each is pickled, behind its length."""

import asyncio
import os
import pickle
import socket
import struct
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

P = TypeVar("P", bound=asyncio.Protocol)

#: Bytes of arrays in a request for an answer, and of what images are sent as. The pixels of an image
#: take about one MiB. What comes behind them on the same line waits for 0.3 ms a MiB.
MOST_BYTES = 4 << 20

#: What Linux tells of a peer: process, user and group.
_PEER = struct.Struct("3i")

#: Bytes of a message's length.
_LENGTH = 4


class Frames:
    """Cuts what comes into messages."""

    def __init__(self) -> None:
        self._received = bytearray()

    def cut(self, data: bytes) -> Iterator[Any]:
        """The messages that ``data`` completes."""
        received, start = self._received, 0
        received += data
        while len(received) >= (begin := start + _LENGTH):
            end = begin + int.from_bytes(received[start:begin], "big")
            if len(received) < end:
                break
            yield pickle.loads(received[begin:end])
            start = end
        del received[:start]


def framed(message: Any) -> bytes:
    """A message as :class:`Frames` cuts it off."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(_LENGTH, "big") + data


async def listen(make: Callable[[], asyncio.Protocol]) -> tuple[asyncio.Server, str]:
    """A server, which makes a protocol for each connection, and its address.

    Raises:
        OSError: there can be none.
    """
    # An abstract address: nothing is left in a file system, however this process ends.
    address = f"\0sightline-{uuid.uuid4().hex}"
    return await asyncio.get_running_loop().create_unix_server(make, address), address


async def connected(address: str, make: Callable[[], P]) -> P | None:
    """A protocol that is connected to the server at ``address``; None if there is no such server here."""
    connection = socket.socket(socket.AF_UNIX)
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
    # uvloop's sockets have no options of their own.
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as peer:
        return _is_own(peer)


def _is_own(peer: socket.socket) -> bool:
    _, user, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return user == os.getuid()
