"""Goodput and memory when far more requests come than the server takes.

    python -m benchmarks.overload [--served] [--limit 16] [--levels 1,2,10] [--seconds 10] [--rounds 3]

Starts the shipped application with room for ``--limit`` open requests: without Ray in a process of its own,
or with ``--served`` by Ray Serve, in the mode that the environment's variables say. At each level that many
times as many clients ask, one request at a time: a chat whose image no other request has, or a text. A
refused client sends its request again after the seconds that ``Retry-After`` says. Prints the requests
answered per second and per second of the server's CPU time, both also as a share of the best level's, the
refusals, the CPU time that the clients took per second, and the server's memory after the level; then the CPU
time of each of the server's processes in milliseconds per answer. The clients are on the same machine, with a
lower priority: where they take CPU time from the server nevertheless, the share by the server's own CPU time
is the one to read.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from benchmarks.orphans import end_with_this_process
from benchmarks.pictures import unique_picture
from benchmarks.processes import process_name
from benchmarks.serve import running

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"


def configuration(limit: int) -> dict[str, Any]:
    """The shipped one with room for this many open requests."""
    config = yaml.safe_load(CONFIG.read_text())
    config["applications"][0]["args"]["ingress"]["max_active_requests"] = limit
    return {"applications": config["applications"]}


def serve(listener: socket.socket, limit: int) -> None:
    """Serve the shipped application at ``listener`` until the process is terminated."""
    import uvicorn

    from deployments.config import AppConfig
    from deployments.in_process import LocalApplication

    args = configuration(limit)["applications"][0]["args"]
    app = LocalApplication(AppConfig.model_validate(args))
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


@contextmanager
def local(limit: int) -> Iterator[str]:
    """The address of the application in a process of its own."""
    end_with_this_process()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        root = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(listener, limit))
        process.start()
    try:
        yield root
    finally:
        process.terminate()
        process.join()


@contextmanager
def served(limit: int) -> Iterator[str]:
    """The address of the application that Ray Serve runs."""
    with running(configuration(limit), 300.0) as base_url:
        yield base_url.removesuffix("/v1")


def body(number: int, tokens: int) -> bytes:
    content: list[dict[str, Any]] = [{"type": "text", "text": "What shape is this?"}]
    if number % 2:
        png = io.BytesIO()
        unique_picture(200, number).save(png, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": content}]
    chat = {"model": "pocket", "messages": messages, "max_tokens": tokens, "ignore_eos": True}
    return json.dumps(chat).encode()


class Clients:
    """Clients that ask, one request at a time each, until the time is up.

    Args:
        bodies: requests. Those that are answered are taken away.

    Attributes:
        answered, refused: requests within the time.
        in_all: answered requests, with those that were open when the time was up.
    """

    def __init__(self, client: aiohttp.ClientSession, bodies: deque[bytes]) -> None:
        self._client, self._bodies = client, bodies
        self.answered = self.in_all = self.refused = 0

    async def ask(self, end: float) -> None:
        asked = b""
        while time.monotonic() < end:
            if not asked:
                if not self._bodies:
                    raise SystemExit("all requests were answered: ask for more --requests")
                asked = self._bodies.popleft()
            async with self._client.post("/v1/chat/completions", data=asked) as response:
                await response.read()
            if response.status == 429:
                self.refused += 1
                # The CPU time of the level is taken when the last client has ended: none may sleep beyond it.
                left = max(end - time.monotonic(), 0)
                await asyncio.sleep(min(float(response.headers["retry-after"]), left))
            else:
                response.raise_for_status()
                self.in_all += 1
                self.answered += time.monotonic() < end
                asked = b""
        if asked:
            self._bodies.append(asked)


async def measure(root: str, options: argparse.Namespace) -> list[dict[str, float]]:
    # Each is answered once, whatever the level: the server may know no image from another level.
    bodies = deque(body(number, options.tokens) for number in range(options.requests))
    totals = {level: Totals() for level in options.levels}
    connections, patience = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(root, connector=connections, timeout=patience) as client:
        await until_ready(client)
        # The first round warms the server up.
        for number in range(options.rounds + 1):
            for level, total in totals.items():
                clients = Clients(client, bodies)
                end, before, own = time.monotonic() + options.seconds, cpu_seconds(), time.process_time()
                await asyncio.gather(*(clients.ask(end) for _ in range(level * options.limit)))
                if number:
                    total.add(clients, cpu_seconds() - before, time.process_time() - own)
    seconds = options.rounds * options.seconds
    rows = [
        {
            "level": level,
            "answered/s": total.answered / seconds,
            "answered/CPU s": total.in_all / total.cpu_s.total(),
            "refused/s": total.refused / seconds,
            "clients' CPU s/s": total.clients_s / seconds,
            "resident MiB": total.resident / 2**20,
        }
        for level, total in totals.items()
    ]
    for name in ("answered/s", "answered/CPU s"):
        best = max(row[name] for row in rows)
        rows = [row | {f"{name} of best": row[name] / best} for row in rows]
    for level, total in totals.items():
        each = [f"{name} {1e3 * used / total.in_all:.1f}" for name, used in total.cpu_s.most_common(8)]
        print(f"level {level}, CPU ms per answer:", ", ".join(each))
    return rows


@dataclass
class Totals:
    """Counts of :class:`Clients` over all rounds of a level, their CPU time, the server's by process, and the
    server's most memory."""

    answered: int = 0
    in_all: int = 0
    refused: int = 0
    cpu_s: Counter[str] = field(default_factory=Counter)
    clients_s: float = 0.0
    resident: int = 0

    def add(self, clients: Clients, cpu_s: Counter[str], clients_s: float) -> None:
        self.answered += clients.answered
        self.in_all += clients.in_all
        self.refused += clients.refused
        self.cpu_s += cpu_s
        self.clients_s += clients_s
        self.resident = max(self.resident, resident_bytes())


def servers() -> list[psutil.Process]:
    """The processes that this one has started, and theirs."""
    return psutil.Process().children(recursive=True)


def cpu_seconds() -> Counter[str]:
    """CPU time that the server's processes have taken, by :func:`process_name`."""
    used: Counter[str] = Counter()
    for process in servers():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used[process_name(" ".join(process.cmdline())) or "other"] += times.user + times.system
    return used


def resident_bytes() -> int:
    """Memory of the server's processes without what they share."""
    total = 0
    for process in servers():
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total


async def until_ready(client: aiohttp.ClientSession) -> None:
    for _ in range(600):
        try:
            async with client.get("/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.5)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--served", action="store_true", help="by Ray Serve")
    parser.add_argument("--limit", type=int, default=16, help="requests that the server has open at a time")
    parser.add_argument(
        "--levels", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 5, 10]
    )
    parser.add_argument("--seconds", type=float, default=10, help="at each level in each round")
    parser.add_argument("--rounds", type=int, default=3, help="through all levels, by turns")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--requests", type=int, default=4000, help="different ones")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    with (served if options.served else local)(options.limit) as root:
        os.nice(5)
        rows = asyncio.run(measure(root, options))
    for row in rows:
        print(" ".join(f"{name} {value:8.2f}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
