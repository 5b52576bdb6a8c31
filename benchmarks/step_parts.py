"""Host time of an engine's steps by part and by kind, on a GPU or with a device that computes nothing.

    python -m benchmarks.step_parts [--shape qwen2-vl-2b] [--answers 40] [--steps 4000] [--cold-mib 4]

The engine is a whole one, with dummy weights if a shape is named, else with the small model of this
repository. ``--answers`` requests run at a time, each of ``--tokens`` tokens; when one ends the next comes,
every second one with an image's embedding rows. Without a GPU the engine takes the way of captured steps,
whose replays do nothing: what is timed is the host's own work.

Kinds of steps: ``answers`` compute a token of each running answer; ``blocks`` are those that give some of
them KV blocks, too; ``text`` admit a prompt of text; ``image`` admit a prompt with an image.

Parts, one after the other: ``schedule``; ``admit`` (the admitted requests' rows of state, a part of
``prepare``); ``prepare`` (the step's arrays, and bringing them to the device); ``launch``; ``take`` (storing
the tokens of the step before); ``text`` (tokens to text), ``line`` (updates to the bytes of a message). The
last two run on other threads in a server. ``step`` is their sum without those two. Times are CPU time of the
thread in microseconds: of a wait for the device nothing counts.

``--cold-mib`` writes so much memory between two steps. In a server a step finds the caches full of what other
threads do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.host import MODEL
from benchmarks.shapes import write_checkpoint
from deployments.ray_serve.frames import framed
from deployments.ray_serve.packing import pack
from engine.collector import COLLECTOR
from engine.config import EngineConfig
from engine.executor import rank
from engine.graphs import Replay
from engine.loading import LoadedEngine, load_engine
from engine.outputs import StreamUpdate
from engine.prompt import EngineInput, MediaItem, MediaSpan
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams

#: Text tokens of a prompt, beside those of its image.
_WORDS = 50
#: Rows of an image and its grid, as of 560 x 560 by Qwen2-VL.
_ROWS, _GRID = 400, (1, 40, 40)
#: Steps that come first and are not counted.
_WARM = 200

KINDS = ("answers", "blocks", "text", "image")
PARTS = ("schedule", "admit", "prepare", "launch", "take", "step", "text", "line")


def idle_capture(work: Callable[[], Any]) -> Replay:
    """A capture whose replays compute nothing."""
    result = work()
    return lambda: result


class _Clock:
    """CPU time of the parts of one step."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = defaultdict(int)

    def timed(self, owner: Any, name: str, part: str) -> None:
        """Have the calls of a method of ``owner`` counted as ``part``."""
        method = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            began = time.thread_time_ns()
            try:
                return method(*args, **options)
            finally:
                self.spent[part] += time.thread_time_ns() - began

        setattr(owner, name, call)


def load(shape: str | None, folder: Path, answers: int) -> LoadedEngine:
    """An engine, on a GPU if there is one; of the small model if ``shape`` is None."""
    on_gpu = torch.cuda.is_available()
    config = EngineConfig(
        model=str(MODEL if shape is None else write_checkpoint(shape, folder)),
        load_format="auto" if shape is None else "dummy",
        max_model_len=4096 if on_gpu else 1024,
        max_num_seqs=max(answers, 256) if on_gpu else answers,
        max_num_batched_tokens=8192 if on_gpu else 512,
        num_kv_blocks=None if on_gpu else 40 * answers,
    )
    if on_gpu:
        return load_engine(config)
    with patch.object(rank, "make_capture", lambda device, enforce_eager: idle_capture):
        return load_engine(config)


class Load:
    """Requests for an engine, one after the other; every second one has an image that none had before."""

    def __init__(self, engine: LoadedEngine, tokens: int) -> None:
        self._engine, self._tokens = engine, tokens
        config = json.loads((Path(engine.config.model) / "config.json").read_text())
        self._image = int(config["image_token_id"])
        self._numbers = itertools.count()
        self._random = random.Random(0)
        runner: Any = engine.core.runner
        width = engine.model.embedding_width
        # As of an encoder in the same process.
        self._rows = torch.zeros((_ROWS, width), dtype=runner.dtype, device=runner.device)

    def next(self) -> RequestGroup:
        number = next(self._numbers)
        ids = [self._random.randrange(10, 250) for _ in range(_WORDS)]
        spans: list[MediaSpan] = []
        if number % 2:
            item = MediaItem.of_rows(
                "image", f"{number:032x}", self._image, _ROWS, grid=_GRID, size=(560, 560)
            )
            spans.append(MediaSpan(item, 10, _ROWS))
            ids[10:10] = [self._image] * _ROWS
        # Of different lengths, so that they don't go on ending together.
        length = self._tokens + self._random.randrange(-8, 9)
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        inputs = EngineInput(ids, spans=spans)
        return self._engine.requests.generation(str(number), inputs, params, [self._rows] * len(spans))


def measure(
    engine: LoadedEngine, load: Load, answers: int, steps: int, cold: int
) -> Iterator[tuple[str, dict]]:
    """Kind and microseconds by part of each of ``steps`` steps.

    Args:
        cold: bytes that are written between two steps.
    """
    core, outputs, clock = engine.core, engine.outputs, _Clock()
    runner: Any = core.runner
    batches: list[Any] = []
    schedule = core.scheduler.schedule

    def noted() -> Any:
        batches.append(schedule())
        return batches[-1]

    core.scheduler.schedule = noted  # type: ignore[method-assign]
    clock.timed(core.scheduler, "schedule", "schedule")
    clock.timed(runner, "_admit", "admit")
    clock.timed(runner, "prepare", "prepare")
    clock.timed(runner, "compute", "launch")
    clock.timed(core, "_collect", "take")
    swept = np.zeros(max(cold, 64), np.uint8)
    running = 0
    for step in range(_WARM + steps):
        if running < answers and (step < answers or step % 2 == 0):
            group = load.next()
            outputs.add(group)
            for request in group.requests:
                core.add(request)
            running += 1
        swept[::64] += 1
        clock.spent.clear()
        began = time.thread_time_ns()
        events = core.step()
        clock.spent["step"] = time.thread_time_ns() - began
        began = time.thread_time_ns()
        results, _ = outputs.process(events)
        clock.spent["text"] = time.thread_time_ns() - began
        began = time.thread_time_ns()
        framed([pack(update) for _, update in results if isinstance(update, StreamUpdate)])
        clock.spent["line"] = time.thread_time_ns() - began
        running -= sum(update.finished for _, update in results if isinstance(update, StreamUpdate))
        batch = batches.pop()
        if step >= _WARM and batch is not None:
            yield _kind(batch), {part: clock.spent[part] / 1e3 for part in PARTS}
    for request in core.scheduler.running + core.scheduler.waiting:
        core.abort(request)
    while core.has_work:
        core.step()


def _kind(batch: Any) -> str:
    if batch.admitted:
        return "image" if any(each.request.spans for each in batch.admitted) else "text"
    return "blocks" if batch.table_updates else "answers"


def summary(found: Iterator[tuple[str, dict]]) -> dict[str, dict[str, Any]]:
    """The 10th, 50th and 99th of a hundred and the maximum of each part, by kind."""
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for kind, spent in found:
        rows[kind].append(spent)
    return {
        kind: {
            "steps": len(each),
            **{
                part: [float(np.percentile([row[part] for row in each], at)) for at in (10, 50, 99, 100)]
                for part in PARTS
            },
        }
        for kind, each in rows.items()
        if each
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", help="of :mod:`benchmarks.shapes`, with an image token")
    parser.add_argument("--answers", type=int, default=40, help="that run at a time")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, about")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--cold-mib", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # The device's work, where a CPU stands in for it, must not wait for other threads.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine = load(options.shape, Path(folder), options.answers)
        cold = int(options.cold_mib * (1 << 20))
        with torch.inference_mode():
            works = Load(engine, options.tokens)
        with COLLECTOR.young_garbage_only():
            found = summary(measure(engine, works, options.answers, options.steps, cold))
    print(f"{'us: p10 / p50 / p99 / most':24}" + "".join(f"{part:>25}" for part in PARTS))
    for kind, row in found.items():
        cells = ("{:.0f} / {:.0f} / {:.0f} / {:.0f}".format(*row[part]) for part in PARTS)
        print(f"{kind:10}{row['steps']:8d} steps" + "".join(f"{cell:>25}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
