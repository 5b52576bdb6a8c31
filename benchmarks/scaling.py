"""Autoscaling by stage, live: images grow preprocessors and encoders, texts the language model.

    python -m benchmarks.scaling [--most 3] [--within 90]

Serves the small model that comes with the project, each stage with one replica that may become ``--most``,
and sends two bursts: images with answers of one token, then texts with long answers. Before each burst every
stage must have one replica again. Prints how many replicas each stage came to, how long its work per replica
stayed above its target, and how long the requests of the burst took.

Fails if a request fails or takes longer than ``--within`` seconds, or if a burst grows other stages than its
own: preprocessor and encoder, or the language model. For a machine with two CPU cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.clients import Trace, ask
from benchmarks.pictures import unique_picture
from benchmarks.routing import MODEL, scrape
from benchmarks.serve import running

#: Of each stage: a metric of its work, the unit in which the target is given, and the target for a replica.
#: Small enough that a burst which two CPU cores can answer is one for the policy.
STAGES = {
    "preprocessor": ("sightline_preprocessor_pending_pixels", 1e6, "megapixels", 4.0),
    "encoder": ("sightline_encoder_pending_visual_tokens", 1.0, "visual_tokens", 256.0),
    "language_model": ("sightline_engine_waiting_tokens", 1.0, "waiting_tokens", 2048.0),
}

#: The stages that each burst is to grow.
GROWN = {"images": {"preprocessor", "encoder"}, "texts": {"language_model"}}


def config(most: int) -> dict[str, Any]:
    """An application whose stages follow their work within seconds."""
    env = {"OMP_NUM_THREADS": "1"}

    def stage(name: str) -> dict[str, Any]:
        *_, signal, target = STAGES[name]
        times = {"upscale_delay_s": 1, "downscale_delay_s": 10, "metrics_interval_s": 0.5}
        scale = {"min_replicas": 1, "max_replicas": most, "look_back_period_s": 2, **times}
        return {"env": env, "autoscaling": {**scale, "targets": {signal: target}}}

    engine = {"model": str(MODEL), "max_model_len": 1024, "max_num_batched_tokens": 512, "max_num_seqs": 16}
    model = {
        "name": "pocket",
        "engine": {**engine, "kv_cache_bytes": 64 << 20, "limit_mm_per_prompt": {"image": 4}},
        "preprocessor": {**stage("preprocessor"), "threads": 1},
        "encoder": {**stage("encoder"), "max_batch_patches": 512},
        "language_model": stage("language_model"),
    }
    args = {"models": [model], "ingress": {"env": env}}
    app = {"name": "bench", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    return {"logging_config": quiet, "applications": [app]}


def images(count: int) -> list[bytes]:
    """Half of the requests show one large image, which takes long to decode; the others four small ones."""
    made = []
    for number in range(count):
        shown = [(1536, number)] if number % 2 else [(224, number * 4 + index) for index in range(4)]
        content: list[dict[str, Any]] = []
        for side, seed in shown:
            buffer = io.BytesIO()
            unique_picture(side, seed).save(buffer, "PNG", compress_level=1)
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": "What shape is this?"})
        made.append(_body(content, 1))
    return made


def texts(count: int) -> list[bytes]:
    """Requests with a prompt of their own each and long answers."""
    words = "red circle blue square left above two green white small"
    return [_body(f"{number} {words} " * 6, 150) for number in range(count)]


def _body(content: Any, tokens: int) -> bytes:
    asked = {"model": "pocket", "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
    return json.dumps(asked | {"ignore_eos": True, "temperature": 0, "stream": True}).encode()


@dataclass
class Watch:
    """Samples of replicas and work, once a second while the block runs.

    Attributes:
        replicas: of each stage, in every sample.
        above: seconds for which a stage's work per replica was above its target.
    """

    base_url: str
    replicas: list[dict[str, int]] = field(default_factory=list)
    above: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        last = time.perf_counter()
        while True:
            found = await scrape(self.base_url)
            now = time.perf_counter()
            self.replicas.append(
                {name: int(found.get(("sightline_stage_replicas", name), 0)) for name in STAGES}
            )
            for name, (metric, unit, _, target) in STAGES.items():
                work = sum(value for (of, _), value in found.items() if of == metric) / unit
                if work > target * max(self.replicas[-1][name], 1):
                    self.above[name] += now - last
            last = now
            await asyncio.sleep(1)

    def most(self) -> dict[str, int]:
        return {name: max(sample[name] for sample in self.replicas) for name in STAGES}

    async def until(self, condition: Callable[[dict[str, int]], bool], seconds: float) -> None:
        """Wait until the last three samples meet the condition."""
        deadline = time.perf_counter() + seconds
        while len(self.replicas) < 3 or not all(map(condition, self.replicas[-3:])):
            if time.perf_counter() > deadline:
                raise SystemExit(f"the stages still have {self.replicas[-1]} replicas")
            await asyncio.sleep(0.3)


async def burst(base_url: str, name: str, requests: list[bytes], seconds: float) -> dict[str, Any]:
    """Send all at once, and wait until each stage has one replica again."""
    timeout = aiohttp.ClientTimeout(total=300)
    traces = [Trace(0.0) for _ in requests]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        async with Watch(base_url) as watch:
            await watch.until(lambda sample: set(sample.values()) == {1}, seconds)
        async with Watch(base_url) as watch:
            began = time.perf_counter()
            for trace in traces:
                trace.due = began
            url = f"{base_url}/chat/completions"
            await asyncio.gather(*(ask(session, url, *each) for each in zip(requests, traces, strict=True)))
            answered = time.perf_counter() - began
            await watch.until(lambda sample: set(sample.values()) == {1}, seconds)
            shrunk = time.perf_counter() - began - answered
    first = [trace.first for trace in traces if trace.first is not None]
    return {
        "burst": name,
        "requests": len(requests),
        "failed": [trace.error for trace in traces if trace.error is not None],
        "most replicas": watch.most(),
        "seconds above the target": {name: round(value, 1) for name, value in watch.above.items()},
        "first token p50 s": float(np.percentile(first, 50)),
        "last answer s": answered,
        "one replica each again after s": shrunk,
    }


def faults(row: dict[str, Any], within: float) -> list[str]:
    """What a burst should not have done."""
    grown = {name for name, most in row["most replicas"].items() if most > 1}
    found = [f"{len(row['failed'])} requests failed: {row['failed'][0]}"] if row["failed"] else []
    if grown != GROWN[row["burst"]]:
        found.append(f"grew {sorted(grown)} instead of {sorted(GROWN[row['burst']])}")
    if row["last answer s"] > within:
        found.append(f"the last answer took longer than {within} s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=48, help="requests of the burst of images")
    parser.add_argument("--texts", type=int, default=96, help="requests of the burst of texts")
    parser.add_argument("--most", type=int, default=3, help="replicas of each stage")
    parser.add_argument(
        "--within", type=float, default=90.0, help="seconds in which a burst is to be answered"
    )
    parser.add_argument("--start-timeout", type=float, default=180.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Ray Serve's replicas report every ten seconds by default.
    for source in ("REPLICA", "HANDLE"):
        os.environ[f"RAY_SERVE_{source}_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "0.5"
    bursts = {"images": images(options.images), "texts": texts(options.texts)}
    rows = []
    with running(config(options.most), options.start_timeout) as base_url:
        for name, requests in bursts.items():
            rows.append(asyncio.run(burst(base_url, name, requests, 120.0)))
            for key, value in rows[-1].items():
                print(
                    f"{key:>32}: {value:.1f}" if isinstance(value, float) else f"{key:>32}: {value}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if wrong := [f"{row['burst']}: {fault}" for row in rows for fault in faults(row, options.within)]:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
