"""Ranks of one language model on several hosts: rank 0's launcher, and what runs on each other host.

Each host has the same number of ranks, in order: rank 0's host has the first. Rank 0 listens on a TCP port
and publishes where, with a key made for this group alone. On every other host each rank connects, and both
sides prove that they know the key before anything else is read. From then on ranks work as on one host.
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
class Meeting:
    """Where the ranks of other hosts find rank 0, and the key that they prove to know.

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
        hosts: how many there are, this one included.
        publish: tells the other hosts of the meeting.
        retract: takes that back.
        timeout_s: how long the others may take to come.
    """

    def __init__(
        self,
        host: str,
        hosts: int,
        publish: Callable[[Meeting], None],
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
            Unavailable: not all of the others have come in time.
        """
        here = self.ranks_here(size)
        lines = dict(enumerate(self._local.start(here), 1))
        key = secrets.token_bytes(32)
        deadline = time.monotonic() + self._timeout_s
        with socket.create_server((self._host, 0), backlog=size) as door:
            self._publish(Meeting(self._host, door.getsockname()[1], key))
            while missing := set(range(1, size)) - lines.keys():
                door.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    guest, _ = door.accept()
                except TimeoutError:
                    self.stop()
                    raise Unavailable(
                        f"Ranks {sorted(missing)} of the language model did not come."
                    ) from None
                line = _proven(guest, key, server=True)
                if line is None:
                    continue
                rank = line.recv()
                if rank in missing:
                    lines[rank] = line
                    self._sockets.append(socket.socket(fileno=os.dup(line.fileno())))
        return [lines[rank] for rank in range(1, size)]

    def kill(self) -> None:
        self._local.kill()
        for each in self._sockets:
            # The ranks of other hosts end when their lines do.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.kill()
        self._local.stop()
        self._retract()

    def clear(self) -> None:
        self._local.clear()


class HostRanks:
    """The ranks of a host that isn't rank 0's. They end with this process, and when rank 0's lines do.

    Args:
        meeting: what rank 0 has published.
        host: the number of this host, from 1.
        here: ranks of each host.
        on_end: called, from a thread, when the first of them has ended.

    Raises:
        Unavailable: rank 0 doesn't answer there, or refuses the key.
    """

    def __init__(self, meeting: Meeting, host: int, here: int, on_end: Callable[[], None]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(host * here, (host + 1) * here):
                guest = socket.create_connection((meeting.host, meeting.port), timeout=_PROOF_S)
                line = _proven(guest, meeting.key, server=False)
                if line is None:
                    raise Unavailable("Rank 0 of the language model refused this host.")
                with line:
                    line.send(rank)
                    self._processes.append(start_rank(line, here))
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
        """Whether all of them run."""
        return all(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        """End all, and return when they are gone; may be called repeatedly."""
        end_ranks(self._processes)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._on_end()


def _proven(peer: socket.socket, key: bytes, *, server: bool) -> Connection | None:
    """The connection to ``peer`` once each side has proven that it knows ``key``; None if it doesn't."""
    peer.setblocking(True)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    _set_patience(peer, _PROOF_S)
    line = Connection(os.dup(peer.fileno()))
    steps = [deliver_challenge, answer_challenge] if server else [answer_challenge, deliver_challenge]
    try:
        for step in steps:
            step(line, key)
    except (AuthenticationError, EOFError, OSError, ValueError) as error:
        logger.warning("a peer did not prove that it belongs to the group: %r", error)
        line.close()
        return None
    finally:
        # Ends with the socket's last descriptor: the line's.
        _set_patience(peer, 0)
        peer.close()
    return line


def _set_patience(peer: socket.socket, seconds: int) -> None:
    """Bound each read and write by ``seconds``; 0 for no bound."""
    value = struct.pack("ll", seconds, 0)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
