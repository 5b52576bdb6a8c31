"""GET requests to hosts that callers name, none of which is trusted."""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import socket
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from engine.errors import MediaError, MediaForbidden
from engine.media.address import redirect_target
from engine.media.guard import FetchPolicy, check_url, is_allowed
from engine.media.limits import ByteBudget, check_size

_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "sightline"}
#: The compressions that HTTP knows. Other words stand for bytes that are in the clear.
_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress", "dcb", "dcz"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TAKEN = frozenset({200, 203})
#: What a gateway says when another attempt may succeed.
_TRY_AGAIN = frozenset({502, 503, 504})
#: Failures that are tried again here. aiohttp itself tries again when a connection ends before the answer.
_FAILURES = (aiohttp.ClientConnectorError, aiohttp.ClientPayloadError)
_CHUNK = 1 << 16
#: Longest header, and most headers. Servers send long policies and many cookies.
_HEADER_BYTES, _MAX_HEADERS = 1 << 16, 512


class HttpClient:
    """Fetches by ``http`` and ``https``, over connections that it keeps for each event loop.

    Args:
        policy: what may be fetched.
        resolver: finds a host's addresses; the system's if None. Each address that it finds is checked, and
            only checked ones are dialled.
    """

    def __init__(self, policy: FetchPolicy, resolver: AbstractResolver | None = None) -> None:
        self._policy = policy
        self._resolver = resolver
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}

    async def get(self, address: str, where: str, budget: ByteBudget) -> bytes:
        """The body that ``address`` answers with, redirects followed.

        A failure of the connection or of a gateway is tried again once, as long as there is time.

        Raises:
            MediaForbidden: the policy doesn't admit an address, the first one or one redirected to.
            MediaTooLarge: the body or the budget is too large.
            MediaError: there is no such image, or it doesn't come in time.
        """
        url = check_url(address, self._policy, where)
        try:
            async with asyncio.timeout(self._policy.timeout):
                return await self._follow(url, where, budget)
        except TimeoutError:
            raise MediaError(
                f"{where}: {url.host} did not deliver within {self._policy.timeout:g} seconds.",
                param=where,
            ) from None
        except MediaError as error:
            error.param = where  # a resolver doesn't know the field that it works for
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise MediaError(
                f"{where}: fetching from {url.host} failed ({type(error).__name__}).", param=where
            ) from error

    async def close(self) -> None:
        """Close the connections of the running loop."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    async def _follow(self, url: URL, where: str, budget: ByteBudget) -> bytes:
        """Follow redirects one by one, so that each address is checked like the first."""
        attempts = 2
        redirects = 0
        while True:
            attempts -= 1
            try:
                found = await self._request(url, where, budget, again=attempts > 0)
            except _FAILURES:
                if not attempts:
                    raise
                continue
            if isinstance(found, bytes):
                return found
            if found is None:
                continue
            if redirects == self._policy.max_redirects:
                raise MediaError(f"{where}: {url.host} redirects more than {redirects} times.", param=where)
            redirects, attempts = redirects + 1, attempts + 1
            target = redirect_target(str(url), found)
            if target is None:
                raise MediaForbidden(f"{where}: {url.host} redirects to an unusable address.", param=where)
            url = check_url(target, self._policy, where)

    async def _request(self, url: URL, where: str, budget: ByteBudget, *, again: bool) -> bytes | str | None:
        """The body, the ``Location`` of a redirect, or None if another attempt may succeed and is left."""
        async with self._session().get(url, allow_redirects=False) as response:
            if response.status in _REDIRECTS:
                return response.headers.get("Location", "")
            if response.status in _TRY_AGAIN and again:
                return None
            return await self._body(response, where, budget)

    async def _body(self, response: aiohttp.ClientResponse, where: str, budget: ByteBudget) -> bytes:
        host = response.url.host
        if response.status not in _TAKEN:
            raise MediaError(f"{where}: {host} answered with status {response.status}.", param=where)
        encodings = response.headers.get("Content-Encoding", "").lower().split(",")
        if not _COMPRESSED.isdisjoint(encoding.strip() for encoding in encodings):
            raise MediaError(f"{where}: {host} sent a compressed body, which is not accepted.", param=where)
        check_size(response.content_length or 0, self._policy, where)
        body = bytearray()
        try:
            async for chunk in response.content.iter_chunked(_CHUNK):
                body += chunk
                budget.take(len(chunk), where)
                check_size(len(body), self._policy, where)
        except _FAILURES:
            budget.give_back(len(body))
            raise
        return bytes(body)

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            connector = aiohttp.TCPConnector(
                resolver=_CheckedResolver(self._resolver or aiohttp.ThreadedResolver(), self._policy),
                limit=self._policy.max_connections,
            )
            session = self._sessions[loop] = aiohttp.ClientSession(
                connector=connector,
                headers=_HEADERS,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                trust_env=False,
                max_line_size=_HEADER_BYTES,
                max_field_size=_HEADER_BYTES,
                **_header_count(),
            )
        return session


class _CheckedResolver(AbstractResolver):
    """Finds addresses, all of which may be dialled."""

    def __init__(self, inner: AbstractResolver, policy: FetchPolicy) -> None:
        self._inner = inner
        self._policy = policy

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for result in found:
            if not is_allowed(ipaddress.ip_address(result["host"]), self._policy):
                raise MediaForbidden(f"The host {host} has an address that is not public.")
        return found

    async def close(self) -> None:
        await self._inner.close()


def _header_count() -> dict[str, Any]:
    """The limit of headers, in releases of aiohttp that have one."""
    known = inspect.signature(aiohttp.ClientSession).parameters
    return {"max_headers": _MAX_HEADERS} if "max_headers" in known else {}
