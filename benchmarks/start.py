"""From the command to the first answers of the whole application, phase by phase, with dummy weights.

    python -m benchmarks.start --shape qwen2-vl-2b --gpu [--starts 2] [--cache FOLDER] [--json FILE]

Starts the application as often as ``--starts`` says. All starts share one folder of compiled kernels, which
is empty at first unless ``--cache`` names one that is not: the first start then compiles them, and the second
finds them. Prints, for each start, the seconds from the command to the end of each phase, in their order. The
times of the phases of a replica are those that it logs.

Compiled Python modules should be kept: with ``PYTHONDONTWRITEBYTECODE`` each process compiles them anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.clients import Trace, ask, bodies
from benchmarks.serve import running, serve_config
from benchmarks.shapes import SHAPES, write_checkpoint

#: What a line of the server's output holds when a phase has ended, and the name of the phase.
_MARKS = {
    "Running config file": "command read",
    "Started a local Ray instance": "Ray runs",
    "Started Serve in namespace": "Serve runs",
    "Imported and built app": "application built",
    "route_patterns=[": "ingress: ready",
    "encoder: modules were imported": "encoder: modules imported",
    "the encoder started": "encoder: ready",
    "language model: modules were imported": "language model: modules imported",
    "the engine started": "language model: ready",
    "ready at http": "announced",
}
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
_SECONDS = re.compile(r" in ([\d.]+) s \((.*)\)")
_IMPORTED = ": modules imported"


def marks(output: str) -> list[tuple[float, str, str]]:
    """The phases whose end ``output`` tells: seconds since 1970, name, and the times of their parts.

    What a replica does first is import modules: its process was ready when that began.
    """
    found = []
    for line in output.splitlines():
        stamp = _TIME.search(line)
        for words, name in _MARKS.items():
            if stamp is not None and words in line:
                ended = datetime.strptime(stamp[0], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                parts = _SECONDS.search(line)
                found.append((ended, name, "" if parts is None else parts[2]))
                if parts is not None and name.endswith(_IMPORTED):
                    process = name.removesuffix(_IMPORTED) + ": process ready"
                    found.append((ended - float(parts[1]), process, ""))
    return found


async def first_answer(base_url: str, body: bytes) -> None:
    """Ask until there is an answer.

    Raises:
        SystemExit: the answer is an error.
    """
    trace = Trace(time.perf_counter())
    async with aiohttp.ClientSession() as session:
        await ask(session, f"{base_url}/chat/completions", body, trace)
    if trace.error is not None or trace.first is None:
        raise SystemExit(f"the first request failed: {trace.error}")


def start(options: argparse.Namespace, config: dict[str, Any], folder: Path) -> list[tuple[float, str, str]]:
    """Start the application once; return the seconds to the end of each phase, its name and its parts."""
    log, began = folder / "start.log", time.time()
    with running(config, options.start_timeout, log) as base_url:
        ends = [(time.time(), "healthy", "")]
        for kind, text_share in (("a text", 1.0), ("an image", 0.0)):
            (body,) = bodies(options, options.shape, [0], 1, text_share)
            asyncio.run(first_answer(base_url, body))
            ends.append((time.time(), f"first answer to {kind}", ""))
    return sorted((ended - began, name, parts) for ended, name, parts in [*marks(log.read_text()), *ends])


@contextmanager
def kernel_cache(given: Path | None) -> Iterator[None]:
    """Keep compiled kernels in ``given``, or in a folder that is empty at first."""
    with tempfile.TemporaryDirectory() as empty:
        former = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = str(given or empty)
        try:
            yield
        finally:
            if former is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = former


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=sorted(SHAPES))
    parser.add_argument("--gpu", action="store_true", help="encoder and language model share a GPU")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="of compiled kernels; an empty one by default")
    parser.add_argument("--start-timeout", type=float, default=180.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.side, options.words, options.tokens = SHAPES[options.shape].picture_size, 20, 8
    options.preprocessors = options.ingresses = options.encoders = options.language_models = (
        options.images
    ) = 1
    options.encoder_gpu = options.one_process = options.engine_in_replica = False
    options.first_token_goal = options.quantization = options.encoder_quantization = None
    options.duty_cycle, options.batch_patches = 1.0, 32768
    options.seqs, options.batched_tokens = 256, 8192 if options.gpu else 512
    rows = []
    with tempfile.TemporaryDirectory() as folder, kernel_cache(options.cache):
        path = Path(folder)
        config = serve_config(options, str(write_checkpoint(options.shape, path)))
        # The phases are told by lines that Ray Serve leaves out of quiet logs.
        del config["logging_config"]
        for number in range(1, options.starts + 1):
            rows.append(start(options, config, path))
            print(f"start {number}: seconds from the command, phase")
            for seconds, name, parts in rows[-1]:
                print(f"{seconds:7.1f}  {name}" + (f" ({parts})" if parts else ""), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
