"""Goodput and memory when far more requests come than the server takes.

    python -m benchmarks.overload [--limit 16] [--levels 1,2,10] [--seconds 10] [--rounds 3]

Starts the shipped application without Ray in a process of its own, with room for ``--limit`` open requests.
At each level that many times as many clients ask, one request at a time: a chat whose image no other request
has, or a text. A refused client comes back after the seconds that ``Retry-After`` says. Prints the requests
answered per second and per second of the server's CPU time, both also as a share of the best level's, the
refusals, and the server's memory. The clients are on the same machine, with a lower priority: where they take
CPU time from the server nevertheless, the share by the server's own CPU time is the one to read.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from benchmarks.pictures import unique_picture

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"


def serve(listener: socket.socket, limit: int) -> None:
    """Serve the shipped application at ``listener`` until the process is terminated."""
    import uvicorn

    from deployments.config import AppConfig
    from deployments.in_process import LocalApplication

    args = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    args["ingress"]["max_active_requests"] = limit
    app = LocalApplication(AppConfig.model_validate(args))
    uvicorn.Server(uvicorn.Config(app.api, log_level="warning")).run([listener])


def body(number: int, tokens: int) -> bytes:
    content: list[dict[str, Any]] = [{"type": "text", "text": "What shape is this?"}]
    if number % 2:
        png = io.BytesIO()
        unique_picture(200, number).save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": content}]
    chat = {"model": "pocket", "messages": messages, "max_tokens": tokens, "ignore_eos": True}
    return json.dumps(chat).encode()


class Clients:
    """Clients that ask, one request at a time each, until the time is up.

    Attributes:
        answered, refused: requests within the time.
        in_all: answered requests, with those that were open when the time was up.
    """

    def __init__(self, client: aiohttp.ClientSession, bodies: list[bytes]) -> None:
        self._client, self._bodies = client, itertools.cycle(bodies)
        self.answered = self.in_all = self.refused = 0

    async def ask(self, end: float) -> None:
        while time.monotonic() < end:
            async with self._client.post("/v1/chat/completions", data=next(self._bodies)) as response:
                await response.read()
            if response.status == 429:
                self.refused += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
            else:
                response.raise_for_status()
                self.in_all += 1
                self.answered += time.monotonic() < end


async def measure(root: str, server: psutil.Process, options: argparse.Namespace) -> list[dict[str, float]]:
    bodies = [body(number, options.tokens) for number in range(options.images)]
    totals = {level: Totals() for level in options.levels}
    connections, patience = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(root, connector=connections, timeout=patience) as client:
        await until_ready(client)
        # The first round warms the server up.
        for number in range(options.rounds + 1):
            for level, total in totals.items():
                clients = Clients(client, bodies)
                end, before = time.monotonic() + options.seconds, cpu_seconds(server)
                await asyncio.gather(*(clients.ask(end) for _ in range(level * options.limit)))
                if number:
                    total.add(clients, cpu_seconds(server) - before)
    seconds = options.rounds * options.seconds
    rows = [
        {
            "level": level,
            "answered/s": total.answered / seconds,
            "answered/CPU s": total.in_all / total.cpu_s,
            "refused/s": total.refused / seconds,
            "resident MiB": server.memory_info().rss / 2**20,
        }
        for level, total in totals.items()
    ]
    for name in ("answered/s", "answered/CPU s"):
        best = max(row[name] for row in rows)
        rows = [row | {f"{name} of best": row[name] / best} for row in rows]
    return rows


@dataclass
class Totals:
    """The counts of :class:`Clients` over all rounds of a level, and the server's CPU time."""

    answered: int = 0
    in_all: int = 0
    refused: int = 0
    cpu_s: float = 0.0

    def add(self, clients: Clients, cpu_s: float) -> None:
        self.answered += clients.answered
        self.in_all += clients.in_all
        self.refused += clients.refused
        self.cpu_s += cpu_s


def cpu_seconds(server: psutil.Process) -> float:
    """CPU time that the server and the processes it has started have taken."""
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(each.user + each.system for each in times)


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
    parser.add_argument("--limit", type=int, default=16, help="requests that the server has open at a time")
    parser.add_argument(
        "--levels", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 5, 10]
    )
    parser.add_argument("--seconds", type=float, default=10, help="at each level in each round")
    parser.add_argument("--rounds", type=int, default=3, help="through all levels, by turns")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--images", type=int, default=2000, help="different requests")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        root = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(listener, options.limit))
        process.start()
    try:
        assert process.pid is not None
        os.nice(5)
        rows = asyncio.run(measure(root, psutil.Process(process.pid), options))
    finally:
        process.terminate()
        process.join()
    for row in rows:
        print(" ".join(f"{name} {value:8.2f}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
