"""Gets the bytes of media from where callers say they are, within a policy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

from aiohttp.abc import AbstractResolver

from engine.media.guard import FetchPolicy
from engine.media.http import HttpClient
from engine.media.ledger import Account
from engine.media.limits import ByteBudget
from engine.media.local import is_remote, read_local, takes_long
from engine.media.source import MediaSource

__all__ = ["ByteBudget", "MediaFetcher"]


class MediaFetcher:
    """Fetches by ``http(s)``, ``data`` and ``file`` URLs. Connections are kept for further items.

    Args:
        policy: what may be fetched.
        resolver: as for :class:`~engine.media.http.HttpClient`.
    """

    def __init__(self, policy: FetchPolicy, resolver: AbstractResolver | None = None) -> None:
        self.policy = policy
        self._client = HttpClient(policy, resolver)
        self._thread: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
        self._starting = threading.Lock()

    async def fetch(self, source: MediaSource, budget: ByteBudget | None = None) -> bytes:
        """The encoded bytes of one image or video file.

        Args:
            source: with ``url`` or ``data``.
            budget: the request's bytes; a budget of ``max_total_bytes`` if None.

        Raises:
            MediaForbidden: the policy doesn't admit the address.
            MediaTooLarge: the item or the budget is too large.
            MediaError: there is no such item, or it doesn't come in time.
        """
        budget = budget or ByteBudget(self.policy.max_total_bytes)
        if source.url is not None and is_remote(source.url):
            return await self._client.get(source, budget)
        if takes_long(source):
            return await asyncio.to_thread(read_local, source, self.policy, budget)
        return read_local(source, self.policy, budget)

    async def fetch_all(
        self, sources: Sequence[MediaSource], account: Account | None = None
    ) -> list[list[bytes]]:
        """Bytes of all items of a request: of each its one image, or its frames. The first error ends all.

        Args:
            account: of the request, to which the bytes are charged as they arrive.

        Raises:
            MediaError: as :meth:`fetch`.
        """
        budget = ByteBudget(self.policy.max_total_bytes, account)
        images = [image for source in sources for image in (source.frames or (source,))]
        tasks = [asyncio.ensure_future(self.fetch(image, budget)) for image in images]
        try:
            found = iter(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [[next(found) for _ in source.frames or (source,)] for source in sources]

    def fetch_blocking(self, source: MediaSource, budget: ByteBudget | None = None) -> bytes:
        """Fetch as :meth:`fetch` does, for callers outside of any event loop."""
        if source.url is None or not is_remote(source.url):
            return read_local(source, self.policy, budget or ByteBudget(self.policy.max_total_bytes))
        return self._run(self.fetch(source, budget))

    async def close(self) -> None:
        """Close the connections of the running loop."""
        await self._client.close()

    def close_blocking(self) -> None:
        """Close the connections that :meth:`fetch_blocking` opened."""
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


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
