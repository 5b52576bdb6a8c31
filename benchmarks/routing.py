"""Routing by content against routing by load, on documents that are asked about again and again.

    python -m benchmarks.routing [--requests 240] [--replicas 3] [--in-process]

Each request shows a document's image and text (Zipf: few documents get most questions) and asks a question
of its own. The served model is the small one that comes with the project. The caches of one replica hold a
part of the documents, so that it counts which replica gets which. Both ways run one after the other.

Prints the share of repeated images that an encoder had cached or was encoding, the share of prompt tokens
from prefix caches, the median and mean time to the first token, and how often an image was encoded that
``--same`` requests showed at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.clients import Trace, ask
from benchmarks.local_replicas import running_locally
from benchmarks.pictures import unique_picture
from benchmarks.serve import running

#: Images that are each shown by several requests at the same time.
ROUNDS = 8

MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket"


def config(routing: str, options: argparse.Namespace) -> dict[str, Any]:
    """An application with several encoders and language models."""
    scale = {"num_replicas": options.replicas, "routing": routing, "env": {"OMP_NUM_THREADS": "1"}}
    engine = {
        "model": str(MODEL),
        "max_model_len": 1024,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "kv_cache_bytes": options.kv_bytes,
    }
    model = {
        "name": "pocket",
        "engine": engine,
        "encoder": {**scale, "cache_bytes": options.encoder_bytes},
        "language_model": scale,
    }
    args = {"models": [model]}
    app = {"name": "bench", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    return {"applications": [app]}


def bodies(options: argparse.Namespace) -> tuple[list[bytes], int]:
    """Requests, the same for both ways, and how many of them show an image that came before."""
    rng = random.Random(1)
    words = ["red", "circle", "blue", "square", "left", "above", "two", "green", "white", "small"]
    documents = [
        (_url(options.side, number), " ".join(rng.choices(words, k=options.words)))
        for number in range(options.documents)
    ]
    weights = [1 / (rank + 1) ** options.zipf for rank in range(options.documents)]
    chosen = rng.choices(range(options.documents), weights, k=options.requests)
    made = []
    for number, document in enumerate(chosen):
        url, text = documents[document]
        made.append(_body(url, f"{text}. Question {number}: what shape is this?"))
    return made, options.requests - len({*chosen})


async def load(base_url: str, requests: list[bytes], at_once: int) -> list[Trace]:
    """Send ``requests`` in order, ``at_once`` at a time."""
    traces: list[Trace] = []
    waiting = iter(requests)

    async def client(session: aiohttp.ClientSession) -> None:
        for body in waiting:
            trace = Trace(time.perf_counter())
            traces.append(trace)
            await ask(session, f"{base_url}/chat/completions", body, trace)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        await asyncio.gather(*(client(session) for _ in range(at_once)))
    return traces


def _url(side: int, seed: int) -> str:
    buffer = io.BytesIO()
    unique_picture(side, seed).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _body(url: str, text: str) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": "pocket", "max_tokens": 4, "stream": True, "temperature": 0}
    return json.dumps(body | {"messages": [{"role": "user", "content": parts}]}).encode()


def same(count: int, side: int, rounds: int) -> list[list[bytes]]:
    """``rounds`` times ``count`` requests: each round's show an image that no other request has."""
    urls = [_url(side, 1_000_000 + number) for number in range(rounds)]
    return [
        [_body(url, f"Question {number}: what shape is this?") for number in range(count)] for url in urls
    ]


async def scrape(base_url: str) -> dict[tuple[str, str], float]:
    """Sums of the metrics over all replicas, by name and stage; the stage is empty where there is none."""
    async with aiohttp.ClientSession() as session, session.get(f"{base_url[:-3]}/metrics") as response:
        text = await response.text()
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("stage", "")
            found[key] = found.get(key, 0.0) + sample.value
    return found


def growth(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]) -> dict[str, float]:
    """How much each metric grew over all stages."""
    grown: dict[str, float] = {}
    for key, value in after.items():
        grown[key[0]] = grown.get(key[0], 0.0) + value - before.get(key, 0.0)
    return grown


def application(given: dict[str, Any], options: argparse.Namespace) -> AbstractContextManager[str]:
    """The application runs inside the block, which gets its base URL."""
    if options.in_process:
        return running_locally(given["applications"][0]["args"])
    return running(given, options.start_timeout)


def measure(routing: str, options: argparse.Namespace) -> dict[str, Any]:
    requests, repeats = bodies(options)
    with application(config(routing, options), options) as base_url:
        # The first call of each replica compiles and loads what later calls have.
        text = {"model": "pocket", "max_tokens": 1, "stream": True, "messages": [{"role": "user"}]}
        text["messages"][0]["content"] = "Hello"
        asyncio.run(load(base_url, [json.dumps(text).encode()] * 12, 6))
        before = asyncio.run(scrape(base_url))
        traces = asyncio.run(load(base_url, requests, options.at_once))
        after = asyncio.run(scrape(base_url))
        rounds = same(options.same, options.side, ROUNDS)
        traces += [trace for each in rounds for trace in asyncio.run(load(base_url, each, options.same))]
        equal = growth(after, asyncio.run(scrape(base_url)))
    grown = growth(before, after)
    hits = grown["sightline_encoder_cache_hits_total"] + grown["sightline_encoder_joined_total"]
    first = [trace.first for trace in traces[: len(requests)] if trace.first is not None]
    return {
        "routing": routing,
        "failed": sum(trace.error is not None for trace in traces),
        "repeats": repeats,
        "encoder hits on repeats": hits / repeats,
        "prompt tokens cached": grown["sightline_engine_cached_tokens_total"]
        / grown["sightline_engine_prompt_tokens_total"],
        "first token median ms": statistics.median(first) * 1e3,
        "first token mean ms": statistics.mean(first) * 1e3,
        "encoded of an image at the same time": equal["sightline_encoder_items_total"] / ROUNDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--zipf", type=float, default=0.9, help="exponent; larger: fewer documents are hot")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=3, help="encoders, and language models")
    parser.add_argument("--same", type=int, default=6, help="requests with one image at the same time")
    parser.add_argument("--words", type=int, default=300, help="of a document")
    parser.add_argument("--side", type=int, default=256, help="of its image")
    parser.add_argument("--kv-bytes", type=int, default=12 << 20)
    parser.add_argument("--encoder-bytes", type=int, default=5 << 18)
    parser.add_argument("--routing", default="load,content", help="ways, comma-separated")
    parser.add_argument("--in-process", action="store_true", help="no Ray: all replicas in this process")
    parser.add_argument("--start-timeout", type=float, default=180.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for routing in options.routing.split(","):
        rows.append(measure(routing, options))
        print(
            "  ".join(
                f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}"
                for key, value in rows[-1].items()
            ),
            flush=True,
        )
    if len(rows) == 2:
        for key in ("prompt tokens cached", "first token median ms", "first token mean ms"):
            print(f"{key}: {rows[1]['routing']} / {rows[0]['routing']} = {rows[1][key] / rows[0][key]:.2f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
