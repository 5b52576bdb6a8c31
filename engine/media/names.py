"""Addresses of the hosts that callers name."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from engine.errors import MediaForbidden
from engine.media.guard import FetchPolicy, is_allowed


class SystemResolver(AbstractResolver):
    """Asks the system, on threads of its own.

    A name whose servers don't answer keeps a thread for as long as the system waits, which nothing can end.
    The event loop's own few threads have other work to do.

    Args:
        threads: names that are looked up at a time.
        seconds: for one name, the wait for a thread included. aiohttp lets a look-up go on when the request
            that wanted it has ended: without a limit, names for which nobody waits would hold up all others.
    """

    def __init__(self, threads: int, seconds: float) -> None:
        self._seconds = seconds
        # Threads start when there is work for them, and end with this object.
        self._threads = ThreadPoolExecutor(threads, "resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of ``host``.

        Raises:
            OSError: the system knows none, or doesn't say so in time.
        """
        loop = asyncio.get_running_loop()
        # What hasn't begun by then is taken out of the queue.
        async with asyncio.timeout(self._seconds):
            return await loop.run_in_executor(self._threads, _look_up, host, port, family)

    async def close(self) -> None:
        """Do nothing: further connections may come, also on other event loops."""


def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return [
        ResolveResult(
            hostname=host, host=_written(address), port=port, family=kind, proto=proto, flags=numeric
        )
        for kind, _, proto, _, address in found
    ]


def _written(address: tuple[Any, ...]) -> str:
    """An address as text, with the scope of one that only means something on a link of this machine."""
    scope = address[3] if len(address) > 3 else 0
    return f"{address[0]}%{scope}" if scope else str(address[0])


class CheckedResolver(AbstractResolver):
    """Finds addresses, all of which may be dialled.

    Args:
        inner: finds them.
        policy: says which may.
    """

    def __init__(self, inner: AbstractResolver, policy: FetchPolicy) -> None:
        self._inner = inner
        self._policy = policy

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of ``host``.

        Raises:
            MediaForbidden: one of them may not be dialled.
        """
        found = await self._inner.resolve(host, port, family)
        for result in found:
            if not is_allowed(ipaddress.ip_address(result["host"]), self._policy):
                raise MediaForbidden(f"The host {host} has an address that is not public.")
        return found

    async def close(self) -> None:
        await self._inner.close()
