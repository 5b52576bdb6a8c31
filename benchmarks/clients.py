"""Clients of a server over HTTP: their requests, the random times of these, and when the answers came."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from typing import Any, Self

import aiohttp

from benchmarks.orphans import end_with_this_process
from benchmarks.pictures import unique_picture

#: Seconds between the last process that has made its requests and the first request.
_START_S = 0.3
#: Other servers refuse a body that doesn't say what it is.
_HEADERS = {"content-type": "application/json"}


@dataclass(slots=True)
class Trace:
    """One request's times, in seconds from when it should have been sent."""

    due: float
    first: float | None = None
    tokens: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        """Times between tokens."""
        return [after - before for before, after in pairwise(self.tokens)]


def bodies(
    options: argparse.Namespace, model: str, numbers: Iterable[int], seed: int, text_share: float
) -> list[bytes]:
    """Requests by their numbers: a share with images that no other request has.

    Args:
        options: ``words``, ``images``, ``side`` and ``tokens`` of the benchmark's command line.
    """
    made = []
    for number in numbers:
        rng = random.Random(seed * 1_000_003 + number)
        content: list[dict[str, Any]] = [
            {"type": "text", "text": " ".join(str(rng.randrange(1000)) for _ in range(options.words))}
        ]
        if rng.random() >= text_share:
            first = (seed * 1_000_003 + number) * options.images
            content[:0] = [_image(options.side, first + index) for index in range(options.images)]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": options.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        made.append(json.dumps(body).encode())
    return made


def _image(side: int, seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    unique_picture(side, seed).save(buffer, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, trace: Trace) -> None:
    """Send one request and note when its parts come."""
    try:
        async with session.post(url, data=body, headers=_HEADERS) as response:
            if response.status != 200:
                trace.error = f"{response.status} {(await response.text())[:200]}"
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now = time.perf_counter() - trace.due
                    if b'"error"' in line[:16]:
                        trace.error = line[:200].decode()
                    elif b'"content":""' not in line:
                        trace.first = trace.first or now
                        trace.tokens.append(now)
    except aiohttp.ClientError as error:
        trace.error = repr(error)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Times of Poisson arrivals in seconds, ``rate`` a second on average."""
    rng = random.Random(seed)
    return list(itertools.accumulate((rng.expovariate(rate) for _ in range(count - 1)), initial=0.0))


class Clients:
    """Processes that ask. One alone would read late what thousands of events a second bring.

    Args:
        count: of them.
    """

    def __init__(self, count: int) -> None:
        end_with_this_process()
        # Each with a pool of its own, so that it sends the requests that it has made.
        self._pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(count)]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for pool in self._pools:
            self._stack.enter_context(pool)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, options: argparse.Namespace, model: str, count: int, seed: int, share: float) -> None:
        """Make the requests of the next :meth:`send`; arguments as of :func:`bodies`."""
        together = len(self._pools)
        shares = [range(first, count, together) for first in range(together)]
        made = [
            pool.submit(_make, options, model, numbers, seed, share)
            for pool, numbers in zip(self._pools, shares, strict=True)
        ]
        for each in made:
            each.result()

    def send(self, base_url: str, due: Sequence[float]) -> tuple[list[Trace], float]:
        """Send each request when it is due, whatever has been answered by then.

        Args:
            due: in seconds from the start, for each request.

        Returns:
            What came back, and the largest share of a core that one of the processes used.
        """
        start, together = time.perf_counter() + _START_S, len(self._pools)
        sent = [
            pool.submit(_send, base_url, [start + each for each in due[first::together]])
            for first, pool in enumerate(self._pools)
        ]
        found = [each.result() for each in sent]
        return [trace for traces, _ in found for trace in traces], max(busy for _, busy in found)


_made: list[bytes] = []


def _make(options: argparse.Namespace, model: str, numbers: range, seed: int, share: float) -> None:
    _made[:] = bodies(options, model, numbers, seed, share)


def _send(base_url: str, due: Sequence[float]) -> tuple[list[Trace], float]:
    """Send what this process has made; ``due`` is by ``time.perf_counter()``, the same in all processes."""
    began, used = time.perf_counter(), time.process_time()
    traces = asyncio.run(_all(base_url, due))
    return traces, (time.process_time() - used) / (time.perf_counter() - began)


async def _all(base_url: str, due: Sequence[float]) -> list[Trace]:
    traces, tasks = list(map(Trace, due)), []
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for body, trace in zip(_made, traces, strict=True):
            await asyncio.sleep(max(0.0, trace.due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(session, f"{base_url}/chat/completions", body, trace)))
        await asyncio.gather(*tasks)
    return traces
