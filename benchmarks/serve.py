"""Load on the whole application over HTTP: open-loop Poisson arrivals, streamed answers.

    python -m benchmarks.serve --shape qwen2-vl-2b --rates 8,16,32 --requests 200

Starts the application with dummy weights in the shape of a public model on a port of its own, unless
``--base-url`` names a running one. Prints for every rate what was served, and percentiles of the time to
the first token (TTFT), between any two tokens of an answer (ITL) and to the end (E2E) in milliseconds, and
the CPU time of the server's processes in microseconds per streamed event.
Goodput counts the requests that kept both ``--slo-ttft`` and ``--slo-itl`` (their mean time between tokens).
``held`` is 1 if 99 of 100 first tokens and 99 of 100 times between tokens did, and nothing failed.

How well running answers keep their pace while images arrive: ITL with ``--text-share 1,0.5``, and the same
with the encoder's ``--duty-cycle`` and ``--batch-patches``, and the engine's ``--batched-tokens`` lowered,
or with ``--encoder-gpu``.

What a request costs beside the models, on any machine: ``--without-model --shape qwen2-vl-2b --tokens 8``.

Several GPUs: ``--one-process --language-models 4`` has an encoder and a language model in one process on each
of four, ``--encoder-gpu --encoders 2 --language-models 2`` has them apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.breakdown import Breakdown
from benchmarks.clients import Clients, Trace, arrivals
from benchmarks.orphans import end_with_this_process
from benchmarks.shapes import SHAPES, write_checkpoint


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
    kept_both = row["ttft p99"] <= options.slo_ttft and row["itl p99"] <= options.slo_itl
    row["held"] = float(kept_both and not row["failed"])
    return row


#: Stands before Ray Serve in the ingress.
DOORSTEP = "deployments.ray_serve.doorstep.middlewares"


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
        end_with_this_process()
        # As docs/failures.md advises for HAProxy; without it this changes nothing.
        environment = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": DOORSTEP, **os.environ}
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            if not asyncio.run(healthy(f"http://127.0.0.1:{port}/health", server, start_timeout)):
                log.seek(0)
                raise SystemExit("the application did not start:\n" + log.read()[-4000:])
            print(f"application up after {time.perf_counter() - began:.1f} s", flush=True)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def serve_config(options: argparse.Namespace, path: str) -> dict[str, Any]:
    engine: dict[str, Any] = {"model": path, "load_format": "dummy", "max_model_len": 4096}
    engine["max_num_batched_tokens"] = options.batched_tokens
    engine["first_token_goal_s"] = options.first_token_goal
    engine |= {"quantization": options.quantization, "encoder_quantization": options.encoder_quantization}
    share: tuple[float, float] = (0.0, 0.0)
    if options.gpu:
        engine |= {"gpu_memory_utilization": 0.7, "max_num_seqs": options.seqs}
        share = (1.0, 1.0) if options.encoder_gpu or options.one_process else (0.25, 0.75)
    elif not options.without_model:
        engine |= {"max_num_seqs": 16, "max_model_len": 512}
    model = {
        "name": options.shape,
        "engine": engine,
        "preprocessor": {"num_replicas": options.preprocessors},
        "encoder": {
            "num_replicas": options.encoders,
            "num_gpus": share[0],
            "duty_cycle": options.duty_cycle,
            "max_batch_patches": options.batch_patches,
            "with_language_model": options.one_process,
        },
        "language_model": {
            "num_replicas": options.language_models,
            "num_gpus": share[1],
            "engine_process": not options.engine_in_replica,
        },
    }
    app = {
        "name": "bench",
        "route_prefix": "/",
        "import_path": f"{'benchmarks.without_model' if options.without_model else 'deployments.app'}:build",
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
    parser.add_argument(
        "--one-process", action="store_true", help="the encoder in the language model's replica"
    )
    parser.add_argument(
        "--engine-in-replica", action="store_true", help="the engine in the process that Ray Serve calls"
    )
    parser.add_argument(
        "--without-model", action="store_true", help="nothing computes: what a request costs beside it"
    )
    parser.add_argument("--rates", default="4", help="requests a second, comma-separated")
    parser.add_argument("--requests", type=int, default=16, help="for each rate")
    parser.add_argument("--seconds", type=float, help="of requests for each rate, in place of --requests")
    parser.add_argument("--side", type=int, help="of the square pictures; the shape's own by default")
    parser.add_argument("--images", type=int, default=1, help="of a request that has any")
    parser.add_argument("--words", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="to be generated")
    parser.add_argument("--text-share", default="0", help="of requests without a picture, comma-separated")
    parser.add_argument("--preprocessors", type=int, default=1)
    parser.add_argument("--encoders", type=int, default=1, help="replicas that encode images")
    parser.add_argument("--language-models", type=int, default=1, help="replicas that generate")
    parser.add_argument("--ingresses", type=int, default=1, help="replicas that speak HTTP")
    parser.add_argument("--clients", type=int, default=1, help="processes that ask")
    parser.add_argument("--breakdown", action="store_true", help="print where the time goes, by stage")
    parser.add_argument("--duty-cycle", type=float, default=1.0, help="of the encoder")
    parser.add_argument("--batch-patches", type=int, default=32768, help="most in one launch of the encoder")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="most in one step of the engine")
    parser.add_argument("--seqs", type=int, default=256, help="most that the engine runs at a time, on a GPU")
    parser.add_argument("--quantization", choices=["fp8"], help="of the decoder's matrices")
    parser.add_argument("--encoder-quantization", choices=["fp8"], help="of the tower's matrices")
    parser.add_argument("--first-token-goal", type=float, help="seconds, of the encoder and the engine")
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
    rates, shares = (list(map(float, given.split(","))) for given in (options.rates, options.text_share))
    with Clients(options.clients) as clients:
        clients.make(options, model, 4 * options.clients, 1, 0.0)
        clients.send(base_url, arrivals(4 * options.clients, 4.0 * options.clients, 1))
        for number, (rate, share) in enumerate(product(rates, shares), start=2):
            count = options.requests if options.seconds is None else round(options.seconds * rate)
            clients.make(options, model, count, number, share)
            with Breakdown(base_url) as breakdown:
                traces, busy = clients.send(base_url, arrivals(count, rate, number))
            rows.append({"text": share, **summary(traces, rate, options)})
            if number == 2:
                print("  ".join(f"{name:>9}" for name in rows[0]))
            print("  ".join(f"{value:9.1f}" for value in rows[-1].values()), flush=True)
            events = max(1, sum(len(trace.tokens) for trace in traces))
            used = breakdown.cpu
            print("CPU us:", ", ".join(f"{name} {used[name] / events * 1e6:.1f}" for name in sorted(used)))
            if options.breakdown:
                print("\n".join([*breakdown.lines(), f"busiest client: {busy:.2f} cores"]), flush=True)
            if errors := [t.error for t in traces if t.error]:
                print("first error:", errors[0])
    return rows


if __name__ == "__main__":
    main()
