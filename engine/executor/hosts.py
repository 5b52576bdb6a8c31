"""Ranks of one language model on several hosts: rank 0's launcher, and the ranks of each other host.

Each host has the same number of ranks, in order: rank 0's host has the first ones. Rank 0 listens on a TCP
port and publishes its address with a key made for this group alone. Each rank of another host connects, and
both sides prove that they know the key before they read anything else. After that, ranks work as on one host.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from engine.errors import Unavailable
from engine.executor.launch import LocalLauncher, end_ranks, start_rank

logger = logging.getLogger(__name__)

#: Seconds that a peer may take to prove that it knows the key.
_PROOF_S = 10

#: A host that vanishes without a word is noticed after about 20 seconds of silence.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The address at which the ranks of other hosts find rank 0, and the key that they prove to know.

    Attributes:
        key: a secret; pass it on only over channels that are private to the group.
    """

    host: str
    port: int
    key: bytes


class HostsLauncher:
    """Starts rank 0's share of the ranks here, and waits for those of the other hosts.

    Args:
        host: an address of this host that the others reach.
        hosts: number of hosts, this one included.
        publish: makes the rendezvous known to the other hosts.
        retract: withdraws it.
        timeout_s: how long the other hosts may take to connect.
    """

    def __init__(
        self,
        host: str,
        hosts: int,
        publish: Callable[[Rendezvous], None],
        retract: Callable[[], None],
        timeout_s: float = 300.0,
    ) -> None:
        self._host, self._hosts = host, hosts
        self._publish, self._retract = publish, retract
        self._timeout_s = timeout_s
        self._local = LocalLauncher()
        self._sockets: list[socket.socket] = []
        with socket.create_server((host, 0)) as free:
            self._port = free.getsockname()[1]

    @property
    def address(self) -> str:
        return f"tcp://{self._host}:{self._port}"

    def ranks_here(self, size: int) -> int:
        return size // self._hosts

    def start(self, size: int) -> list[Connection]:
        """See :class:`~engine.executor.launch.Launcher`.

        Raises:
            Unavailable: some rank did not connect in time.
        """
        here = self.ranks_here(size)
        connections = dict(enumerate(self._local.start(here), 1))
        key = secrets.token_bytes(32)
        deadline = time.monotonic() + self._timeout_s
        with socket.create_server((self._host, 0), backlog=size) as listener:
            self._publish(Rendezvous(self._host, listener.getsockname()[1], key))
            while missing := set(range(1, size)) - connections.keys():
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    self.stop()
                    raise Unavailable(
                        f"Ranks {sorted(missing)} of the language model did not connect in "
                        f"{self._timeout_s:.0f} s: see the logs of their hosts."
                    ) from None
                connection = _proven(peer, key, server=True)
                if connection is None:
                    continue
                rank = connection.recv()
                if rank in missing:
                    connections[rank] = connection
                    self._sockets.append(socket.socket(fileno=os.dup(connection.fileno())))
        return [connections[rank] for rank in range(1, size)]

    def kill(self) -> None:
        self._local.kill()
        for each in self._sockets:
            # The ranks of other hosts end when their connections do.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.kill()
        self._local.stop()
        self._retract()

    def clear(self) -> None:
        self._local.clear()


class HostRanks:
    """The ranks of a host other than rank 0's. They end with this process, or with rank 0's connections.

    Args:
        rendezvous: as rank 0 has published it.
        host: the number of this host, from 1.
        here: number of ranks on each host.
        on_end: called, from a thread, when the first of them has ended.

    Raises:
        Unavailable: rank 0 doesn't answer there, or refuses the key.
    """

    def __init__(self, rendezvous: Rendezvous, host: int, here: int, on_end: Callable[[], None]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(host * here, (host + 1) * here):
                peer = socket.create_connection((rendezvous.host, rendezvous.port), timeout=_PROOF_S)
                connection = _proven(peer, rendezvous.key, server=False)
                if connection is None:
                    raise Unavailable("Rank 0 of the language model refused this host.")
                with connection:
                    connection.send(rank)
                    self._processes.append(start_rank(connection, here))
        except (OSError, Unavailable) as error:
            self.stop()
            if isinstance(error, Unavailable):
                raise
            raise Unavailable(f"Rank 0 of the language model can't be reached: {error}") from error
        self._on_end = on_end
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), name="host-rank", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Return whether all of them run."""
        return all(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        """End all, and return when they are gone; may be called repeatedly."""
        end_ranks(self._processes)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._on_end()


def _proven(peer: socket.socket, key: bytes, *, server: bool) -> Connection | None:
    """Return the connection to ``peer``, once both sides have proven that they know ``key``, else None."""
    peer.setblocking(True)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    _set_timeouts(peer, _PROOF_S)
    connection = Connection(os.dup(peer.fileno()))
    steps = [deliver_challenge, answer_challenge] if server else [answer_challenge, deliver_challenge]
    try:
        for step in steps:
            step(connection, key)
    except (AuthenticationError, EOFError, OSError, ValueError) as error:
        logger.warning("a peer did not prove that it belongs to the group: %r", error)
        connection.close()
        return None
    finally:
        # Ends with the socket's last descriptor: the connection's.
        _set_timeouts(peer, 0)
        peer.close()
    return connection


def _set_timeouts(peer: socket.socket, seconds: int) -> None:
    """Bound each read and write by ``seconds``; 0 for no bound."""
    value = struct.pack("ll", seconds, 0)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
