"""Load on the whole application over HTTP: open-loop Poisson arrivals, streamed answers.

    python -m benchmarks.serve --shape qwen2-vl-2b --rates 8,16,32 --requests 200

Starts the application with dummy weights in the shape of a public model on a port of its own, unless
``--base-url`` names a running one. Prints for every rate what was served, and percentiles of the time to
the first token (TTFT), between any two tokens of an answer (ITL) and to the end (E2E) in milliseconds, and
the CPU time of the server's processes in microseconds per streamed event.
Goodput counts the requests that kept both ``--slo-ttft`` and ``--slo-itl`` (their mean time between tokens).

How well running answers keep their pace while images arrive: ITL with ``--text-share 1,0.5``, and the same
with the encoder's ``--duty-cycle`` and ``--batch-patches``, and the engine's ``--batched-tokens`` lowered,
or with ``--encoder-gpu``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.pictures import unique_picture
from benchmarks.processes import cpu_seconds
from benchmarks.shapes import SHAPES, write_checkpoint


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


def bodies(options: argparse.Namespace, model: str, count: int, seed: int, text_share: float) -> list[bytes]:
    """Requests, made beforehand: a share with one image each that no other request has."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        content: list[dict[str, Any]] = [
            {"type": "text", "text": " ".join(str(rng.randrange(1000)) for _ in range(options.words))}
        ]
        if rng.random() >= text_share:
            buffer = io.BytesIO()
            unique_picture(options.side, seed * 1_000_003 + index).save(buffer, "JPEG", quality=90)
            url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
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


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, trace: Trace) -> None:
    """Send one request and note when its parts come."""
    try:
        async with session.post(url, data=body) as response:
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


async def load(base_url: str, requests: list[bytes], rate: float, seed: int) -> list[Trace]:
    """Send all at random times, ``rate`` a second on average, whatever has been answered by then."""
    rng = random.Random(seed)
    start, due, traces, tasks = time.perf_counter() + 0.1, 0.0, [], []
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for body in requests:
            trace = Trace(start + due)
            traces.append(trace)
            await asyncio.sleep(max(0.0, trace.due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(session, f"{base_url}/chat/completions", body, trace)))
            due += rng.expovariate(rate)
        await asyncio.gather(*tasks)
    return traces


def summary(traces: list[Trace], rate: float, options: argparse.Namespace) -> dict[str, float]:
    good = [t for t in traces if t.error is None and t.first is not None]
    row: dict[str, float] = {"rate": rate, "failed": len(traces) - len(good)}
    if not good:
        return row
    span = max(t.due + t.tokens[-1] for t in good) - min(t.due for t in good)
    kept = [
        t
        for t in good
        if t.first * 1e3 <= options.slo_ttft and sum(t.gaps) * 1e3 <= options.slo_itl * len(t.gaps)
    ]
    row |= {"req/s": len(good) / span, "goodput": len(kept) / span}
    for name, values in (
        ("ttft", [t.first for t in good]),
        ("itl", [gap for t in good for gap in t.gaps] or [0.0]),
        ("e2e", [t.tokens[-1] for t in good]),
    ):
        for percent in (50, 99):
            row[f"{name} p{percent}"] = float(np.percentile(np.array(values), percent)) * 1e3
    return row


@contextmanager
def application(options: argparse.Namespace) -> Iterator[str]:
    """A running application with dummy weights; its base URL."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(options.shape, Path(folder))
        with running(serve_config(options, str(path)), options.start_timeout) as base_url:
            yield base_url


@contextmanager
def running(config: dict[str, Any], start_timeout: float, log_file: Path | None = None) -> Iterator[str]:
    """The application of ``config`` on a port and a Ray cluster of its own; its base URL.

    Args:
        log_file: where its output is kept; nowhere if None.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        file = Path(folder) / "serve.json"
        file.write_text(json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, **config}))
        command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
        command += ["--address", "local", str(file)]
        log = (log_file or Path(folder) / "serve.log").open("w+")
        began = time.perf_counter()
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        # The server must not outlive a benchmark that is ended by ``timeout``.
        former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            if not asyncio.run(healthy(f"http://127.0.0.1:{port}/health", server, start_timeout)):
                log.seek(0)
                raise SystemExit("the application did not start:\n" + log.read()[-4000:])
            print(f"application up after {time.perf_counter() - began:.1f} s", flush=True)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            signal.signal(signal.SIGTERM, former)
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def serve_config(options: argparse.Namespace, path: str) -> dict[str, Any]:
    engine: dict[str, Any] = {"model": path, "load_format": "dummy", "max_model_len": 4096}
    engine["max_num_batched_tokens"] = options.batched_tokens
    share: tuple[float, float] = (0.0, 0.0)
    if options.gpu:
        engine |= {"gpu_memory_utilization": 0.7, "max_num_seqs": 256}
        share = (1.0, 1.0) if options.encoder_gpu else (0.25, 0.75)
    else:
        engine |= {"max_num_seqs": 16, "max_model_len": 512}
    model = {
        "name": options.shape,
        "engine": engine,
        "preprocessor": {"num_replicas": options.preprocessors},
        "encoder": {
            "num_gpus": share[0],
            "duty_cycle": options.duty_cycle,
            "max_batch_patches": options.batch_patches,
        },
        "language_model": {"num_gpus": share[1]},
    }
    app = {
        "name": "bench",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": {"models": [model], "ingress": {"num_replicas": options.ingresses}},
    }
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    return {"logging_config": quiet, "applications": [app]}


async def healthy(url: str, server: subprocess.Popen, seconds: float) -> bool:
    """Wait until the application answers; False if it ended or the time is up."""
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and server.poll() is None:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return True
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.3)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=sorted(SHAPES))
    parser.add_argument("--base-url", help="of a running application")
    parser.add_argument("--model", help="to be asked; the shape's name by default")
    parser.add_argument(
        "--gpu", action="store_true", help="encoder on a quarter of a GPU, the rest on it too"
    )
    parser.add_argument(
        "--encoder-gpu",
        action="store_true",
        help="with --gpu, the encoder on a GPU that the rest leaves alone",
    )
    parser.add_argument("--rates", default="4", help="requests a second, comma-separated")
    parser.add_argument("--requests", type=int, default=16, help="for each rate")
    parser.add_argument("--side", type=int, help="of the square pictures; the shape's own by default")
    parser.add_argument("--words", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="to be generated")
    parser.add_argument("--text-share", default="0", help="of requests without a picture, comma-separated")
    parser.add_argument("--preprocessors", type=int, default=1)
    parser.add_argument("--ingresses", type=int, default=1, help="replicas that speak HTTP")
    parser.add_argument("--duty-cycle", type=float, default=1.0, help="of the encoder")
    parser.add_argument("--batch-patches", type=int, default=32768, help="most in one launch of the encoder")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="most in one step of the engine")
    parser.add_argument("--slo-ttft", type=float, default=500.0)
    parser.add_argument("--slo-itl", type=float, default=50.0)
    parser.add_argument("--start-timeout", type=float, default=180.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.side = options.side or SHAPES[options.shape].picture_size
    if options.base_url:
        rows = run(options, options.base_url)
    else:
        with application(options) as base_url:
            rows = run(options, base_url)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def run(options: argparse.Namespace, base_url: str) -> list[dict[str, float]]:
    """All rates with each share of text, after a few requests that are not counted."""
    rows: list[dict[str, float]] = []
    model = options.model or options.shape
    asyncio.run(load(base_url, bodies(options, model, 4, 1, 0.0), 4.0, 1))
    rates, shares = (list(map(float, given.split(","))) for given in (options.rates, options.text_share))
    for number, (rate, share) in enumerate(product(rates, shares), start=2):
        requests = bodies(options, model, options.requests, number, share)
        before = cpu_seconds()
        traces = asyncio.run(load(base_url, requests, rate, number))
        used = cpu_seconds() - before
        rows.append({"text": share, **summary(traces, rate, options)})
        if number == 2:
            print("  ".join(f"{name:>9}" for name in rows[0]))
        print("  ".join(f"{value:9.1f}" for value in rows[-1].values()), flush=True)
        events = max(1, sum(len(trace.tokens) for trace in traces))
        print("CPU us:", ", ".join(f"{name} {used[name] / events * 1e6:.1f}" for name in sorted(used)))
        if errors := [t.error for t in traces if t.error]:
            print("first error:", errors[0])
    return rows


if __name__ == "__main__":
    main()
