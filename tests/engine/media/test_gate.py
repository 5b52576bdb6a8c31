"""Downloads from slow hosts, and those of other callers beside them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.errors import MediaError, MediaTooLarge, Overloaded
from engine.media.fetch import ByteBudget, MediaFetcher
from engine.media.guard import FetchPolicy
from engine.media.source import MediaSource
from tests.serving import wait_until

BODY = b"x" * 1000


class Hosts:
    """A slow host, 127.0.0.2, that answers when it is told to, and a fast one, 127.0.0.3."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.released = asyncio.Event()
        self.port = 0

    def url(self, host: str, path: str = "/a.png") -> MediaSource:
        return MediaSource(0, f"from {host}", url=f"http://{host}:{self.port}{path}")

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        self.asked[path] += 1
        if "127.0.0.2" in head:
            await self.released.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n" + BODY)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def hosts(**policy) -> AsyncIterator[tuple[Hosts, MediaFetcher]]:
    made = Hosts()
    slow = await asyncio.start_server(made.answer, "127.0.0.2", 0)
    made.port = slow.sockets[0].getsockname()[1]
    fast = await asyncio.start_server(made.answer, "127.0.0.3", made.port)
    options = {"allow_private": ("127.0.0.0/8",), "allowed_ports": {made.port}, "timeout": 60} | policy
    fetcher = MediaFetcher(FetchPolicy(**options))
    try:
        yield made, fetcher
    finally:
        made.released.set()
        await fetcher.close()
        slow.close()
        fast.close()


def start(fetcher: MediaFetcher, sources: list[MediaSource]) -> list[asyncio.Task[bytes]]:
    return [asyncio.ensure_future(fetcher.fetch(source)) for source in sources]


async def test_a_slow_host_holds_no_place_of_others():
    async with hosts(max_connections=4, max_connections_per_host=2) as (here, fetcher):
        slow = start(fetcher, [here.url("127.0.0.2", f"/{i}.png") for i in range(20)])
        await wait_until(lambda: sum(here.asked.values()) == 2)
        fast = [await fetcher.fetch(here.url("127.0.0.3", f"/fast{i}.png")) for i in range(5)]
        assert fast == [BODY] * 5
        assert not any(task.done() for task in slow)
        here.released.set()
        assert await asyncio.gather(*slow) == [BODY] * 20


async def test_waiting_for_earlier_downloads_is_not_the_hosts_time():
    async with hosts(max_connections_per_host=1, timeout=2) as (here, fetcher):
        first, *others = start(fetcher, [here.url("127.0.0.2", f"/{i}.png") for i in range(4)])
        with pytest.raises(MediaError, match=r"from 127\.0\.0\.2: 127\.0\.0\.2 did not deliver within 2 "):
            await first
        # The others waited as long; their host's time begins now.
        here.released.set()
        assert await asyncio.gather(*others) == [BODY] * 3


async def test_too_many_downloads_from_one_host_are_refused():
    async with hosts(max_connections_per_host=1, max_waiting_per_host=2) as (here, fetcher):
        held = start(fetcher, [here.url("127.0.0.2", f"/{i}.png") for i in range(3)])
        await wait_until(lambda: here.asked)
        with pytest.raises(Overloaded, match=r"too many downloads from 127\.0\.0\.2"):
            await fetcher.fetch(here.url("127.0.0.2", "/more.png"))
        here.released.set()
        await asyncio.gather(*held)
        assert await fetcher.fetch(here.url("127.0.0.2", "/more.png")) == BODY


async def test_who_waits_too_long_is_told_so():
    async with hosts(max_connections_per_host=1, queue_timeout=0.2) as (here, fetcher):
        held = start(fetcher, [here.url("127.0.0.2")])
        await wait_until(lambda: here.asked)
        with pytest.raises(Overloaded, match=r"waited 0\.2 seconds for earlier downloads"):
            await fetcher.fetch(here.url("127.0.0.2", "/b.png"))
        here.released.set()
        await asyncio.gather(*held)


async def test_equal_addresses_are_fetched_once():
    async with hosts() as (here, fetcher):
        tasks = start(fetcher, [here.url("127.0.0.2")] * 8)
        await wait_until(lambda: here.asked)
        here.released.set()
        assert await asyncio.gather(*tasks) == [BODY] * 8
        assert here.asked == {"/a.png": 1}


async def test_who_joins_a_download_doesnt_depend_on_its_first_caller():
    async with hosts() as (here, fetcher):
        first, *others = start(fetcher, [here.url("127.0.0.2")] * 4)
        await wait_until(lambda: here.asked)
        first.cancel()
        await asyncio.wait([first])
        await wait_until(lambda: here.asked["/a.png"] == 2)
        here.released.set()
        assert await asyncio.gather(*others) == [BODY] * 3
        assert here.asked["/a.png"] == 2


async def test_a_budget_too_small_is_that_callers_alone():
    async with hosts() as (here, fetcher):
        source = here.url("127.0.0.2")
        poor = asyncio.ensure_future(fetcher.fetch(source, ByteBudget(10)))
        await wait_until(lambda: here.asked)
        rich = start(fetcher, [source] * 3)
        await asyncio.sleep(0)
        here.released.set()
        with pytest.raises(MediaTooLarge):
            await poor
        assert await asyncio.gather(*rich) == [BODY] * 3
        with pytest.raises(MediaTooLarge, match="more than 10 bytes"):
            await fetcher.fetch(source, ByteBudget(10))


async def test_a_hosts_fault_names_each_callers_field():
    async with hosts(timeout=2) as (here, fetcher):
        fields = [MediaSource(0, f"field {i}", url=here.url("127.0.0.2").url) for i in range(3)]
        faults = await asyncio.gather(*start(fetcher, fields), return_exceptions=True)
        assert [fault.param for fault in faults] == ["field 0", "field 1", "field 2"]
        assert all(str(fault).startswith(f"field {i}: 127.0.0.2 did not") for i, fault in enumerate(faults))
        assert here.asked == {"/a.png": 1}
