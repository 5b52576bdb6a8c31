"""Getting the bytes of pictures from where callers say they are, within a policy."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import os
import socket
import stat
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from engine.errors import MediaError, MediaForbidden, MediaTooLarge
from engine.media.guard import FetchPolicy, check_url, is_allowed
from engine.media.source import MediaSource

_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "sightline"}
_CHUNK = 1 << 16
#: From this size on, decoding a data URL is no work for an event loop.
_LARGE = 1 << 18


class ByteBudget:
    """Bytes that all items of a request may have together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    def take(self, count: int, where: str) -> None:
        """Count ``count`` more bytes.

        Raises:
            MediaTooLarge: the limit is passed.
        """
        self._taken += count
        if self._taken > self._limit:
            raise MediaTooLarge(
                f"{where}: the pictures of this request have more than {self._limit} bytes together.",
                param=where,
            )


class MediaFetcher:
    """Fetches by ``http(s)``, ``data`` and ``file`` URLs. Connections are kept for further items.

    Args:
        policy: what may be fetched.
        resolver: finds a host's addresses; the system's if not given. Each address it finds is checked, and
            only those checked are dialled.
    """

    def __init__(self, policy: FetchPolicy, resolver: AbstractResolver | None = None) -> None:
        self.policy = policy
        self._resolver = resolver
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}
        self._thread: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
        self._starting = threading.Lock()

    async def fetch(self, source: MediaSource, budget: ByteBudget | None = None) -> bytes:
        """The encoded bytes of one picture.

        Args:
            source: with ``url`` or ``data``.
            budget: what it may draw from; its own ``max_total_bytes`` if not given.

        Raises:
            MediaForbidden: the policy doesn't admit the address.
            MediaTooLarge: the picture or the budget is too large.
            MediaError: there is no such picture, or it doesn't come in time.
        """
        budget = budget or ByteBudget(self.policy.max_total_bytes)
        if source.url is None or not _is_remote(source.url):
            if source.url is not None and (_is_file(source.url) or len(source.url) > _LARGE):
                return await asyncio.to_thread(self._local, source, budget)
            return self._local(source, budget)
        url = check_url(source.url, self.policy, source.where)
        try:
            async with asyncio.timeout(self.policy.timeout):
                return await self._follow(url, source.where, budget)
        except TimeoutError:
            raise MediaError(
                f"{source.where}: {url.host} did not deliver within {self.policy.timeout:g} seconds.",
                param=source.where,
            ) from None
        except MediaError as error:
            error.param = source.where  # a resolver does not know for which field it works
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise MediaError(
                f"{source.where}: fetching from {url.host} failed ({type(error).__name__}).",
                param=source.where,
            ) from error

    async def fetch_all(self, sources: Sequence[MediaSource]) -> list[list[bytes]]:
        """Bytes of all items of a request: for each its one picture, or its frames. The first error ends all.

        Raises:
            MediaError: as :meth:`fetch`.
        """
        budget = ByteBudget(self.policy.max_total_bytes)
        pictures = [picture for source in sources for picture in (source.frames or (source,))]
        tasks = [asyncio.ensure_future(self.fetch(picture, budget)) for picture in pictures]
        try:
            found = iter(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [[next(found) for _ in source.frames or (source,)] for source in sources]

    def fetch_blocking(self, source: MediaSource, budget: ByteBudget | None = None) -> bytes:
        """As :meth:`fetch`, for callers outside of any event loop."""
        if source.url is None or not _is_remote(source.url):
            return self._local(source, budget or ByteBudget(self.policy.max_total_bytes))
        return self._run(self.fetch(source, budget))

    async def close(self) -> None:
        """Close the connections of the running loop."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    def close_blocking(self) -> None:
        """Close what :meth:`fetch_blocking` opened."""
        with self._starting:
            running, self._thread = self._thread, None
        if running is not None:
            loop, thread = running
            asyncio.run_coroutine_threadsafe(self.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _run(self, work: Coroutine[Any, Any, bytes]) -> bytes:
        with self._starting:
            if self._thread is None:
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_run_loop, args=(loop,), name="media-fetch", daemon=True)
                thread.start()
                self._thread = loop, thread
            loop, _ = self._thread
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            connector = aiohttp.TCPConnector(
                resolver=_CheckedResolver(self._resolver or aiohttp.ThreadedResolver(), self.policy),
                limit=self.policy.max_connections,
            )
            session = self._sessions[loop] = aiohttp.ClientSession(
                connector=connector,
                headers=_HEADERS,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                trust_env=False,
            )
        return session

    async def _follow(self, url: URL, where: str, budget: ByteBudget) -> bytes:
        """Redirects are followed by hand, so that each address is checked like the first."""
        for _ in range(self.policy.max_redirects + 1):
            async with self._session().get(url, allow_redirects=False) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    return await self._body(response, where, budget)
                target = response.headers.get("Location", "")
            url = _redirected(url, target, self.policy, where)
        raise MediaError(
            f"{where}: {url.host} redirects more than {self.policy.max_redirects} times.", param=where
        )

    async def _body(self, response: aiohttp.ClientResponse, where: str, budget: ByteBudget) -> bytes:
        host = response.url.host
        if response.status != 200:
            raise MediaError(f"{where}: {host} answered with status {response.status}.", param=where)
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise MediaError(f"{where}: {host} sent a compressed body, which is not accepted.", param=where)
        self._check_size(response.content_length or 0, where)
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            budget.take(len(chunk), where)
            body += chunk
            self._check_size(len(body), where)
        return bytes(body)

    def _local(self, source: MediaSource, budget: ByteBudget) -> bytes:
        where = source.where
        if source.data is not None:
            data = source.data
        elif source.url is None:
            raise MediaError(f"{where}: there is neither a URL nor data.", param=where)
        elif _is_file(source.url):
            data = self._read_file(source.url, where)
        else:
            data = self._decode_data_url(source.url, where)
        self._check_size(len(data), where)
        budget.take(len(data), where)
        return data

    def _decode_data_url(self, url: str, where: str) -> bytes:
        head, comma, payload = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise MediaError(f"{where}: a data URL must look like data:image/png;base64,...", param=where)
        self._check_size(len(payload) // 4 * 3 - 2, where)
        try:
            return base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError):
            raise MediaError(f"{where}: the data URL is not valid base64.", param=where) from None

    def _read_file(self, url: str, where: str) -> bytes:
        allowed = self.policy.allowed_local_media_path
        if allowed is None:
            raise MediaForbidden(f"{where}: this server reads no files.", param=where)
        host, slash, rest = url[len("file://") :].partition("/")
        if host not in ("", "localhost") or not slash:
            raise MediaForbidden(f"{where}: a file URL must look like file:///folder/name.", param=where)
        try:
            path = Path(os.fsdecode(b"/" + unquote_to_bytes(rest))).resolve()
            inside = path.is_relative_to(Path(allowed).resolve())
        except (OSError, ValueError, RuntimeError):
            inside = False
        if not inside:
            raise MediaForbidden(f"{where}: the file is outside of the folder that may be read.", param=where)
        try:
            return _read_regular(path, self.policy.max_bytes + 1)
        except OSError:
            raise MediaError(f"{where}: there is no such file.", param=where) from None

    def _check_size(self, count: int, where: str) -> None:
        if count > self.policy.max_bytes:
            raise MediaTooLarge(
                f"{where}: the picture has more than {self.policy.max_bytes} bytes.", param=where
            )


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


def _redirected(url: URL, target: str, policy: FetchPolicy, where: str) -> URL:
    if "\\" in target or any(ord(c) <= 0x20 or 0x7F <= ord(c) < 0xA0 for c in target) or not target:
        raise MediaForbidden(f"{where}: {url.host} redirects to an unusable address.", param=where)
    return check_url(str(url.join(URL(target))), policy, where)


def _read_regular(path: Path, count: int) -> bytes:
    """Up to ``count`` bytes of a regular file; OSError for anything else."""
    # Non-blocking, so that a pipe without a writer can't hold us up.
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(f"{path} is no regular file")
        with os.fdopen(opened, "rb", closefd=False) as file:
            return file.read(count)
    finally:
        os.close(opened)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _is_file(url: str) -> bool:
    return url[:7].lower() == "file://"


def _is_remote(url: str) -> bool:
    return not _is_file(url) and url[:5].lower() != "data:"
