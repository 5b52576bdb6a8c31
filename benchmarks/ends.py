"""Time from the end of a request to the end of the work for it.

    python -m benchmarks.ends [--repeats 20]

Starts the shipped application by Ray Serve, in the mode that the environment's variables say. A client asks
for an answer about an image that never comes, and leaves; or it names a second image that can't be fetched.
The time ends when the server of the image sees its connection close. Or the client leaves while tokens are
made. The time then ends when the engine says that it has no request. It is asked by Ray's actor calls, one
after another, whose own time is printed: the time found is up to one call too long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import yaml

from benchmarks.processes import cluster_of
from benchmarks.serve import running

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"
#: An address of this machine that nothing else uses: images may be fetched from it.
IMAGES = "127.0.0.2"
#: A request whose answer takes far longer than its client waits.
LONG = {
    "messages": [{"role": "user", "content": "Hello!"}],
    "n": 4,
    "max_tokens": 900,
    "ignore_eos": True,
}
#: Seconds after which work counts as never ended.
LONGEST_S = 60.0


class ImageServer:
    """Serves no image: ``/silent`` gets no answer, anything else 404.

    Attributes:
        asked: how many connections wait for ``/silent``.
        closed_at: when the last of them was closed.
        refused_at: when the last 404 was sent.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.closed_at = self.refused_at = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/silent" in head:
            self.asked += 1
            await reader.read()
            self.closed_at = time.perf_counter()
            self.asked -= 1
        else:
            # The other image must be on its way.
            await _until(lambda: bool(self.asked))
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            self.refused_at = time.perf_counter()
        writer.close()


@asynccontextmanager
async def image_server(port: int) -> AsyncIterator[ImageServer]:
    images = ImageServer()
    server = await asyncio.start_server(images.serve, IMAGES, port)
    try:
        yield images
    finally:
        server.close()


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + LONGEST_S
    while not condition():
        if time.perf_counter() > deadline:
            raise SystemExit(f"the work did not end within {LONGEST_S:.0f} s")
        await asyncio.sleep(0.001)


class Client:
    """A connection of its own that sends one request."""

    def __init__(self, base_url: str) -> None:
        self._url = urlsplit(base_url)

    async def send(self, body: dict[str, Any]) -> asyncio.StreamReader:
        reader, self._writer = await asyncio.open_connection(self._url.hostname, self._url.port)
        data = json.dumps({"model": "pocket", **body}).encode()
        head = f"POST {self._url.path}/chat/completions HTTP/1.1\r\nhost: benchmark\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        await self._writer.drain()
        return reader

    def leave(self) -> float:
        """Close the connection; the time now."""
        self._writer.close()
        return time.perf_counter()


@asynccontextmanager
async def served_engine(server: psutil.Process) -> AsyncIterator[Engine]:
    """The language model of the application that ``server`` has started; this process joins its cluster."""
    import ray
    from ray import serve

    ray.init(cluster_of(server), log_to_driver=False)
    try:
        engine = Engine(serve.get_deployment_handle("LanguageModel:pocket", "sightline"))
        # The first call opens connections.
        await engine.running()
        engine.longest_s = 0.0
        yield engine
    finally:
        ray.shutdown()


async def measure(base_url: str, port: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds to the end of the work, by event; last the slowest call that asked the engine.

    Args:
        port: where images are served.
        repeats: of each event.
    """
    silent, missing = (f"http://{IMAGES}:{port}/{name}" for name in ("silent", "missing"))
    found: dict[str, list[float]] = {}
    async with image_server(port) as images, served_engine(psutil.Process()) as engine:

        async def leaves(stream: bool) -> float:
            client = Client(base_url)
            await client.send({"messages": _looking_at(silent), "stream": stream})
            await _until(lambda: images.asked == 1)
            left = client.leave()
            await _until(lambda: not images.asked)
            return images.closed_at - left

        async def fails() -> float:
            client = Client(base_url)
            await client.send({"messages": _looking_at(silent, missing)})
            await _until(lambda: images.closed_at > images.refused_at > asked)
            client.leave()
            return images.closed_at - images.refused_at

        async def leaves_tokens(stream: bool) -> float:
            client = Client(base_url)
            reader = await client.send({**LONG, "stream": stream})
            if stream:
                await reader.readuntil(b"data: ")
            await engine.until(busy=True)
            left = client.leave()
            await engine.until(busy=False)
            return time.perf_counter() - left

        for _ in range(repeats):
            asked = time.perf_counter()
            events = {
                "the client leaves while an image is fetched": leaves(False),
                "the client leaves while an image is fetched, streamed": leaves(True),
                "another image of the request can't be fetched": fails(),
                "the client leaves while tokens are made, four choices": leaves_tokens(True),
                "the client leaves while tokens are made, four choices, whole": leaves_tokens(False),
            }
            for name, event in events.items():
                found.setdefault(name, []).append(1000 * await event)
    return {**found, "a call that asks the engine": [1000 * engine.longest_s]}


def _looking_at(*urls: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}]


class Engine:
    """A served language model, asked by Ray's actor calls.

    Args:
        handle: of its deployment.

    Attributes:
        longest_s: the time that the slowest call took.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(_by_reference=True)
        self.longest_s = 0.0

    async def running(self) -> int:
        """The requests that have a slot."""
        began = time.perf_counter()
        found = await self._handle.metrics.remote()
        self.longest_s = max(self.longest_s, time.perf_counter() - began)
        return found["running"]

    async def until(self, busy: bool) -> None:
        """Wait until there are such requests, or none."""
        deadline = time.perf_counter() + LONGEST_S
        while bool(await self.running()) != busy:
            if time.perf_counter() > deadline:
                raise SystemExit("the engine did not end its requests, or did not begin any")


def configuration(port: int) -> dict[str, Any]:
    """The shipped one; images may be fetched from :data:`IMAGES`."""
    config = yaml.safe_load(CONFIG.read_text())
    args = config["applications"][0]["args"]
    args["fetch"] = {"allow_private": [f"{IMAGES}/32"], "allowed_ports": [port], "timeout": 300}
    return {"applications": config["applications"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--image-port", type=int, default=18765)
    parser.add_argument("--start-timeout", type=float, default=180.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = configuration(options.image_port)
    # A cluster asks for a token, which this process sends only with this variable; Ray reads it once loaded.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    with running(config, options.start_timeout) as base_url:
        found = asyncio.run(measure(base_url, options.image_port, options.repeats))
    for name, times in found.items():
        print(f"{name}: median {statistics.median(times):.0f} ms, longest {max(times):.0f} ms")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
