"""Equal GPUs, laid out in several ways: the highest rate of requests with images that keeps two promises.

Layouts of N GPUs:
    whole     each GPU has an encoder and a language model in one process
    shared    the same in two processes, as Ray Serve runs fractions of a GPU
    1 + N-1   one GPU has an encoder, the others have a language model each; 2 + N-2 from four GPUs on

Requests come at random times (Poisson), have 1 or 4 images of 640 by 640 pixels and get 150 tokens. Goodput
is the highest rate tried at which 99 % of the first tokens come within 2 s, and 99 % of the times between
tokens of all answers are within 100 ms; ``fails at`` is the lowest rate tried beyond it. The first rate tried
is that at which requests end that all come at once. Requests take turns at the language models, and images at
the encoders. Prompts and pixels are prepared beforehand: GPUs are compared, not CPUs. All processes are
started once for a model, and a layout uses some of them. Embeddings travel between processes by sockets, as
bytes in the host's memory.

Replicas that share nothing can be measured one by one: with ``--gpus 1 --of 4`` one GPU gets every fourth
request, and rates are those of all four. Encoders apart need all their GPUs. Long steps make long gaps
between tokens; ``--batched-tokens`` bounds them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.multi_gpu_processes import Settings, answer_of, emit, start
from benchmarks.multi_gpu_replicas import Result, Run, Shown, run_encoder, run_language_model
from benchmarks.shapes import write_checkpoint

TTFT_S, GAP_S, PERCENT = 2.0, 0.1, 99
#: Seconds that a request may take after the last one was sent.
DRAIN_S = 16.0
#: The same for those that come at once: the first of them wait for kernels to be compiled.
DRAIN_AT_ONCE_S = 90.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Which of the processes a layout uses, by the numbers of their GPUs.

    Attributes:
        encoders: None for each language model's own.
        replicas: how many language models take turns; those that aren't listed are not run.
    """

    name: str
    encoders: list[int] | None
    language_models: list[int]
    replicas: int


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are made.

    Attributes:
        shapes: keys of :data:`~benchmarks.shapes.SHAPES`.
        images: of a request, by turns.
        side: of the images, in pixels.
        tokens: of an answer.
        seconds: for which requests are sent at a rate.
        burst: how many images all come at once to each language model, to find the first rate.
        most_rates: how many rates are tried at most.
    """

    shapes: list[str]
    images: list[int]
    side: int
    tokens: int
    seconds: float
    burst: int
    most_rates: int


GPU_LOAD = Load(["qwen2-vl-2b", "qwen2-vl-7b"], [1, 4], 640, 150, 10.0, 96, 12)
CPU_LOAD = Load(["tiny"], [2], 112, 4, 0.5, 4, 1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rate gave; times in seconds, at :data:`PERCENT`."""

    rate: float
    held: bool
    ttft: float
    gap: float


def layouts(gpus: int, of: int | None = None) -> list[Layout]:
    """Those of ``gpus``, or the part that ``gpus`` are of a layout of ``of`` GPUs."""
    everywhere, every = list(range(gpus)), of or gpus
    apart = [count for count in (1, 2) if of is None and (count == 1 or gpus >= 4)]
    return [
        Layout(f"{every} whole", None, everywhere, every),
        *(Layout(f"{n} + {gpus - n}", everywhere[:n], everywhere[n:], gpus - n) for n in apart),
        Layout(f"{every} shared", everywhere, everywhere, every),
    ]


def run(settings: Settings) -> None:
    end = time.monotonic() + settings.seconds
    load = GPU_LOAD if settings.on_gpu else CPU_LOAD
    load = replace(load, shapes=settings.shapes or load.shapes, images=settings.images or load.images)
    chosen = layouts(settings.gpus, settings.of)
    if settings.layouts is not None:
        chosen = [layout for layout in chosen if _kind(layout, settings) in settings.layouts]
    for number, shape in enumerate(load.shapes):
        share = (end - time.monotonic()) / (len(load.shapes) - number)
        _run_shape(settings, load, shape, chosen, time.monotonic() + share)


def _kind(layout: Layout, settings: Settings) -> str:
    return layout.name.removeprefix(f"{settings.of or settings.gpus} ")


def _run_shape(settings: Settings, load: Load, shape: str, chosen: list[Layout], end: float) -> None:
    with processes(settings, load, shape) as connections:
        searches = [(images, layout) for images in load.images for layout in chosen]
        for number, (images, layout) in enumerate(searches):
            deadline = time.monotonic() + (end - time.monotonic()) / (len(searches) - number)
            replicas = Replicas(connections, layout, Shown(images, load.tokens))
            burst = max(2, load.burst // images)
            # Kernels are compiled by the first of the two.
            first_rate = [replicas.at_once(burst) for _ in range(2)][-1]
            best, fails = search(
                lambda rate, seconds=load.seconds, replicas=replicas: replicas.at(rate, seconds),
                first_rate,
                deadline,
                load.seconds + 4.0 * settings.on_gpu,
                load.most_rates,
            )
            figures: dict[str, Any] = {"goodput req/s": best.rate if best else 0.0}
            figures["fails at"] = fails.rate if fails else None
            figures["at once req/s"] = first_rate
            for prefix, outcome in (("", best), ("fails with ", fails)):
                if outcome is not None:
                    figures[f"{prefix}ttft p99 ms"] = outcome.ttft * 1e3
                    figures[f"{prefix}itl p99 ms"] = outcome.gap * 1e3
            emit(f"{shape}, {layout.name}, {images} images", **figures)


def search(
    at: Callable[[float], Outcome], rate: float, deadline: float, takes: float, most: int
) -> tuple[Outcome | None, Outcome | None]:
    """Find the highest rate that holds: first by steps that grow, then between the two that enclose it.

    Args:
        at: tries a rate.
        rate: to be tried first.
        deadline: on the monotonic clock; no rate is tried that would end later.
        takes: seconds that one rate takes at least.
        most: how many rates are tried.

    Returns:
        The outcomes at the highest rate that held and at the lowest that did not.
    """
    best: Outcome | None = None
    fails: Outcome | None = None
    step = 1.25
    for _ in range(most):
        outcome = at(rate)
        if outcome.held:
            best = outcome
        else:
            fails = outcome
        if best is not None and fails is not None:
            rate = (best.rate * fails.rate) ** 0.5
        else:
            rate = rate * step if best else rate / step
            step **= 1.5
        close = best is not None and fails is not None and fails.rate < 1.06 * best.rate
        if close or time.monotonic() + takes > deadline:
            break
    return best, fails


class Replicas:
    """The processes of a layout.

    Args:
        connections: to all language model processes, by GPU.
        shown: what the requests are like.
    """

    def __init__(self, connections: list[Any], layout: Layout, shown: Shown) -> None:
        self._connections = [connections[number] for number in layout.language_models]
        self._encoders = layout.encoders
        self._replicas = layout.replicas
        self._shown = shown
        self._seed = 0

    def at(self, rate: float, seconds: float) -> Outcome:
        """Send requests at ``rate`` a second to all replicas of the layout for ``seconds``."""
        self._seed += 1
        count = max(2 * self._replicas, round(rate * seconds))
        begin = time.perf_counter() + 0.3
        due = begin + np.random.default_rng(self._seed).exponential(1 / rate, count).cumsum()
        turns = [due[number :: self._replicas].tolist() for number in range(len(self._connections))]
        # More late first tokens than this fail the rate, so it isn't tried to its end.
        allowed = int(sum(map(len, turns)) * (1 - PERCENT / 100))
        results = self._run(turns, allowed)
        if not all(result.finished for result in results):
            # Encoders go on with images of requests that were given up.
            self.at_once(1)
        ttfts = [ttft for result in results for ttft in result.ttfts]
        ttft = float(np.percentile(ttfts, PERCENT)) if ttfts else float("inf")
        gap = float(np.percentile([0.0, *(gap for result in results for gap in result.gaps)], PERCENT))
        held = all(result.finished for result in results) and ttft <= TTFT_S and gap <= GAP_S
        outcome = Outcome(rate, held, ttft, gap)
        print(f"rate {rate:.2f}: {outcome}", flush=True)
        return outcome

    def at_once(self, count: int) -> float:
        """Send ``count`` requests to each replica at once; returns how many end a second in all replicas."""
        begin = time.perf_counter() + 0.3
        turns = [[begin] * count for _ in self._connections]
        results = self._run(turns, count * len(self._connections), DRAIN_AT_ONCE_S)
        if not all(result.finished for result in results):
            raise RuntimeError(f"{count} requests at once did not end within {DRAIN_AT_ONCE_S} s")
        return count * self._replicas / (max(result.ended for result in results) - begin)

    def _run(self, turns: list[list[float]], late_allowed: int, drain: float = DRAIN_S) -> list[Result]:
        """Send requests to each language model when they are due; one that fails ends the others."""
        last = max(turn[-1] for turn in turns) + drain
        for (_, connection), turn in zip(self._connections, turns, strict=True):
            connection.send(Run(turn, self._encoders, self._shown, last, late_allowed, TTFT_S))
        by_connection = {connection: (process, connection) for process, connection in self._connections}
        open_, results = set(by_connection), []
        while open_:
            for connection in wait(list(open_)):
                open_.remove(connection)
                failed_before = any(not result.finished for result in results)
                results.append(answer_of(*by_connection[connection]))
                if not results[-1].finished and not failed_before:
                    for other in open_:
                        other.send(None)
        return results


@contextmanager
def processes(settings: Settings, load: Load, shape: str) -> Iterator[list[Any]]:
    """An encoder and a language model process on each GPU; yields those of the language models."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_checkpoint(shape, Path(folder) / "model"))
        sockets = [f"{folder}/encoder{number}" for number in range(settings.gpus)]
        gpus = [number if settings.on_gpu else None for number in range(settings.gpus)]
        encoders = [start(run_encoder, path, *pair) for pair in zip(gpus, sockets, strict=True)]
        told = (sockets, shape, load.side, settings.batched_tokens)
        models = [start(run_language_model, path, gpu, *told) for gpu in gpus]
        try:
            for pair in (*encoders, *models):
                answer_of(*pair)
            # The encoders' sockets are there now.
            for _, connection in models:
                connection.send(load.images)
            for pair in models:
                answer_of(*pair)
            yield models
        finally:
            for process, _ in (*models, *encoders):
                process.terminate()
            for process, _ in (*models, *encoders):
                process.join()
