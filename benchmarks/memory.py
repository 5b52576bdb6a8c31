"""Measures memory growth over many requests: texts and images of all sizes, a tenth of them sampled.

    python -m benchmarks.memory --shape qwen2-vl-2b --requests 10000 [--json FILE]

Prints the process's resident memory, and on a GPU the memory that tensors hold, after every tenth of the
requests. The first tenth fills caches and pools; what counts is the growth after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.offline import load, timed, versions
from benchmarks.pictures import unique_picture
from benchmarks.shapes import SHAPES, write_checkpoint
from engine import LLM, SamplingParams

_TOGETHER = 250


def requests(shape: str, count: int, rng: random.Random) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """A quarter with an image of its own, one in ten sampled; no two prompts alike."""
    own, prompts, params = SHAPES[shape], [], []
    for _ in range(count):
        text = " ".join(str(rng.randrange(10**6)) for _ in range(rng.randint(1, 40)))
        prompt: dict[str, Any] = {"prompt": text}
        if rng.random() < 0.25:
            image = unique_picture(own.picture_size // 2, rng.randrange(1 << 40))
            prompt = {"prompt": own.picture + text, "multi_modal_data": {"image": image}}
        prompts.append(prompt)
        temperature = 1.0 if rng.random() < 0.1 else 0.0
        params.append(SamplingParams(temperature=temperature, max_tokens=rng.randint(1, 12), ignore_eos=True))
    return prompts, params


def resident_mib() -> float:
    """Return this process's resident memory in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)


def held_mib() -> float:
    """By tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() / (1 << 20) if torch.cuda.is_available() else 0.0


def run(llm: LLM, shape: str, count: int) -> list[dict[str, float]]:
    """Requests done, and memory after them, for every tenth of ``count``."""
    rng, rows, done = random.Random(0), [], 0
    while done < count:
        goal = min(count, done + -(-count // 10))
        while done < goal:
            prompts, params = requests(shape, min(_TOGETHER, goal - done), rng)
            done += len(llm.generate(prompts, params, use_tqdm=False))
        rows.append({"requests": done, "resident MiB": resident_mib(), "held MiB": held_mib()})
        print("  ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=sorted(SHAPES))
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(options.shape, Path(folder))
        llm = load(str(path), torch.cuda.is_available())
        seconds, rows = timed(lambda: run(llm, options.shape, options.requests))
        llm.check_integrity()
    results: dict[str, Any] = {"shape": options.shape, **versions(), "seconds": seconds, "rows": rows}
    first, last = rows[0], rows[-1]
    for name in ("resident MiB", "held MiB"):
        results[f"{name} grown"] = last[name] - first[name]
        grown = results[f"{name} grown"]
        print(f"{name} grown by {grown:.1f} in {last['requests'] - first['requests']:.0f} requests")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
