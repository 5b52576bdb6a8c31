"""GET requests to hosts that callers name, none of which is trusted."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from engine.errors import MediaError, MediaForbidden, MediaTooLarge
from engine.media.address import redirect_target
from engine.media.gate import HostGate
from engine.media.guard import FetchPolicy, check_url
from engine.media.limits import ByteBudget, check_size
from engine.media.names import CheckedResolver, SystemResolver
from engine.media.source import MediaSource

_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "sightline"}
_ACCEPTED = {"image": "image/*", "video": "video/*", "document": "application/pdf"}
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


#: What an error of the connection means, the first that fits.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ClientConnectorDNSError, "no address is known for this name"),
    (aiohttp.ClientSSLError, "its certificate or its TLS is not valid"),
    (aiohttp.ClientConnectorError, "no connection could be opened"),
    (aiohttp.ClientResponseError, "the answer is not valid HTTP"),
    (aiohttp.ClientPayloadError, "the connection ended before the file did"),
    (aiohttp.ServerDisconnectedError, "the connection ended before the answer"),
)


def _reason(error: Exception) -> str:
    """Why a fetch failed, without the addresses that errors of the system name."""
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), type(error).__name__)


class HttpClient:
    """Fetches by ``http`` and ``https``, over connections that it keeps for each event loop.

    Args:
        policy: what may be fetched.
        resolver: finds a host's addresses; the system's if None. Each address that it finds is checked, and
            only checked ones are dialled.
    """

    def __init__(self, policy: FetchPolicy, resolver: AbstractResolver | None = None) -> None:
        self._policy = policy
        longest = max(map(policy.time_limit, _ACCEPTED))
        self._resolver = resolver or SystemResolver(policy.max_connections, longest)
        self._loops: dict[asyncio.AbstractEventLoop, _OnLoop] = {}

    async def get(self, source: MediaSource, budget: ByteBudget) -> bytes:
        """The body that the source's URL answers with, redirects followed.

        A failure of the connection or of a gateway is tried again once, as long as there is time. Requests
        that want the same URL at a time share one download.

        Raises:
            MediaForbidden: the policy doesn't admit an address, the first one or one redirected to.
            MediaTooLarge: the body or the budget is too large.
            MediaError: there is no such item, or it doesn't come in time.
            Overloaded: too many downloads from the host are under way.
        """
        assert source.url is not None
        url, where = check_url(source.url, self._policy, source.where), source.where
        flights = self._here().flights
        key = str(url), source.kind
        while (flight := flights.get(key)) is not None:
            body = await flight.joined(where)
            if body is not None:
                budget.take(len(body), where)
                return body
        flight = flights[key] = _Flight()
        try:
            body = await self._download(url, source, budget)
            flight.end(body)
            return body
        except MediaError as error:
            flight.end(None if isinstance(error, MediaTooLarge) else error)
            raise
        finally:
            # A caller that is cancelled, or lacks the bytes, leaves the download to those who joined it.
            flight.end(None)
            if flights.get(key) is flight:
                del flights[key]

    async def _download(self, url: URL, source: MediaSource, budget: ByteBudget) -> bytes:
        where, seconds = source.where, self._policy.time_limit(source.kind)
        try:
            async with self._here().gate.place(str(url.host), where), asyncio.timeout(seconds):
                return await self._follow(url, source, budget)
        except TimeoutError:
            raise MediaError(
                f"{where}: {url.host} did not deliver within {seconds:g} seconds.", param=where
            ) from None
        except MediaError as error:
            error.param = where  # a resolver doesn't know the field that it works for
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise MediaError(
                f"{where}: fetching from {url.host} failed: {_reason(error)}.", param=where
            ) from error

    async def close(self) -> None:
        """Close the connections of the running loop."""
        here = self._loops.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here.session.close()

    async def _follow(self, url: URL, source: MediaSource, budget: ByteBudget) -> bytes:
        """Follow redirects one by one, so that each address is checked like the first."""
        where, attempts, redirects = source.where, 2, 0
        while True:
            attempts -= 1
            try:
                found = await self._request(url, source, budget, again=attempts > 0)
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

    async def _request(
        self, url: URL, source: MediaSource, budget: ByteBudget, *, again: bool
    ) -> bytes | str | None:
        """The body, the ``Location`` of a redirect, or None if another attempt may succeed and is left."""
        headers = {"Accept": _ACCEPTED[source.kind]}
        async with self._here().session.get(url, allow_redirects=False, headers=headers) as response:
            if response.status in _REDIRECTS:
                return response.headers.get("Location", "")
            if response.status in _TRY_AGAIN and again:
                return None
            return await self._body(response, source, budget)

    async def _body(self, response: aiohttp.ClientResponse, source: MediaSource, budget: ByteBudget) -> bytes:
        where, host = source.where, response.url.host
        if response.status not in _TAKEN:
            raise MediaError(f"{where}: {host} answered with status {response.status}.", param=where)
        encodings = response.headers.get("Content-Encoding", "").lower().split(",")
        if not _COMPRESSED.isdisjoint(encoding.strip() for encoding in encodings):
            raise MediaError(f"{where}: {host} sent a compressed body, which is not accepted.", param=where)
        check_size(response.content_length or 0, self._policy, source)
        body = bytearray()
        try:
            async for chunk in response.content.iter_chunked(_CHUNK):
                body += chunk
                budget.take(len(chunk), where)
                check_size(len(body), self._policy, source)
        except _FAILURES:
            budget.give_back(len(body))
            raise
        return bytes(body)

    def _here(self) -> _OnLoop:
        """Return the state of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops[loop] = _OnLoop(self._open(), HostGate(self._policy))
        return self._loops[loop]

    def _open(self) -> aiohttp.ClientSession:
        # The gate bounds the downloads; each needs a connection at once.
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver(self._resolver, self._policy),
            limit=0,
        )
        return aiohttp.ClientSession(
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


@dataclass(frozen=True, slots=True)
class _OnLoop:
    """The connections, the places and the downloads under way of one event loop."""

    session: aiohttp.ClientSession
    gate: HostGate
    flights: dict[tuple[str, str], _Flight] = field(default_factory=dict)


class _Flight:
    """A download that further callers may join."""

    def __init__(self) -> None:
        self._ended: asyncio.Future[bytes | MediaError | None] = asyncio.get_running_loop().create_future()

    def end(self, result: bytes | MediaError | None) -> None:
        """Hand over the body or the host's fault; None if only the caller's own request ended."""
        if not self._ended.done():
            self._ended.set_result(result)

    async def joined(self, where: str) -> bytes | None:
        """The body; None if it must be fetched again.

        Raises:
            MediaError: the host's fault, for the field ``where``.
        """
        result = await asyncio.shield(self._ended)
        if isinstance(result, MediaError):
            _, _, text = result.message.partition(": ")
            raise type(result)(f"{where}: {text}", param=where)
        return result


def _header_count() -> dict[str, Any]:
    """The limit of headers, in releases of aiohttp that have one."""
    known = inspect.signature(aiohttp.ClientSession).parameters
    return {"max_headers": _MAX_HEADERS} if "max_headers" in known else {}
