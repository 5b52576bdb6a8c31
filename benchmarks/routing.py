"""Routing by content against routing by load, on documents that are asked about again and again.

    python -m benchmarks.routing [--requests 240] [--replicas 3]

Each request shows a document's image and text (Zipf: few documents get most questions) and asks a question
of its own. The served model is the small one that comes with the project. The caches of one replica hold a
part of the documents, so that it counts which replica gets which. Both ways run one after the other.

Prints the share of repeated images that an encoder had cached or was encoding, the share of prompt tokens
from prefix caches, and the median and mean time to the first token.
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
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.pictures import unique_picture
from benchmarks.serve import Trace, ask, running

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
    documents = []
    for number in range(options.documents):
        buffer = io.BytesIO()
        unique_picture(options.side, number).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        documents.append((url, " ".join(rng.choices(words, k=options.words))))
    weights = [1 / (rank + 1) ** options.zipf for rank in range(options.documents)]
    chosen = rng.choices(range(options.documents), weights, k=options.requests)
    made = []
    for number, document in enumerate(chosen):
        url, text = documents[document]
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": f"{text}. Question {number}: what shape is this?"},
        ]
        body = {"model": "pocket", "max_tokens": 4, "stream": True, "temperature": 0}
        made.append(json.dumps(body | {"messages": [{"role": "user", "content": parts}]}).encode())
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


async def scrape(base_url: str) -> dict[str, float]:
    """Sums of the metrics over all replicas, by name."""
    async with aiohttp.ClientSession() as session, session.get(f"{base_url[:-3]}/metrics") as response:
        text = await response.text()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def measure(routing: str, options: argparse.Namespace) -> dict[str, Any]:
    requests, repeats = bodies(options)
    with running(config(routing, options), options.start_timeout) as base_url:
        # The first call of each replica compiles and loads what later calls have.
        text = {"model": "pocket", "max_tokens": 1, "stream": True, "messages": [{"role": "user"}]}
        text["messages"][0]["content"] = "Hello"
        asyncio.run(load(base_url, [json.dumps(text).encode()] * 12, 6))
        before = asyncio.run(scrape(base_url))
        traces = asyncio.run(load(base_url, requests, options.at_once))
        after = asyncio.run(scrape(base_url))
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    hits = grown["sightline_encoder_cache_hits_total"] + grown["sightline_encoder_joined_total"]
    first = [trace.first for trace in traces if trace.first is not None]
    return {
        "routing": routing,
        "failed": sum(trace.error is not None for trace in traces),
        "repeats": repeats,
        "encoder hits on repeats": hits / repeats,
        "prompt tokens cached": grown["sightline_engine_cached_tokens_total"]
        / grown["sightline_engine_prompt_tokens_total"],
        "first token median ms": statistics.median(first) * 1e3,
        "first token mean ms": statistics.mean(first) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--zipf", type=float, default=0.9, help="exponent; larger: fewer documents are hot")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=3, help="encoders, and language models")
    parser.add_argument("--words", type=int, default=300, help="of a document")
    parser.add_argument("--side", type=int, default=256, help="of its image")
    parser.add_argument("--kv-bytes", type=int, default=12 << 20)
    parser.add_argument("--encoder-bytes", type=int, default=5 << 18)
    parser.add_argument("--routing", default="load,content", help="ways, comma-separated")
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
