"""Places for downloads: a slow host takes none that others need."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator

from engine.errors import Overloaded
from engine.media.guard import FetchPolicy


class HostGate:
    """Bounds the downloads from one host, and those from all hosts together, on one event loop.

    Waiting for a place costs the caller none of the time that a host has for its answer.
    """

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        self._all = asyncio.Semaphore(policy.max_connections)
        self._hosts: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(policy.max_connections_per_host)
        )
        self._users: defaultdict[str, int] = defaultdict(int)

    @contextlib.asynccontextmanager
    async def place(self, host: str, where: str) -> AsyncIterator[None]:
        """Hold a place for a download from ``host``.

        Raises:
            Overloaded: too many downloads wait for this host already, or a place isn't free in time.
        """
        policy = self._policy
        if self._users[host] >= policy.max_connections_per_host + policy.max_waiting_per_host:
            raise Overloaded(f"{where}: too many downloads from {host} are waiting; try again later.")
        self._users[host] += 1
        try:
            async with contextlib.AsyncExitStack() as held:
                try:
                    async with asyncio.timeout(policy.queue_timeout):
                        # The host's place comes first: who waits for a slow host holds no place of others.
                        await held.enter_async_context(self._hosts[host])
                        await held.enter_async_context(self._all)
                except TimeoutError:
                    raise Overloaded(
                        f"{where}: downloads from {host} waited {policy.queue_timeout:g} seconds for earlier "
                        "downloads to end; try again later."
                    ) from None
                yield
        finally:
            self._users[host] -= 1
            if not self._users[host]:
                del self._users[host]
                self._hosts.pop(host, None)
