"""Equal GPUs, laid out in several ways: the highest rate of requests with images that keeps two promises.

Layouts of N GPUs:
    whole     each GPU has an encoder and a language model in one process
    shared    the same in two processes, as Ray Serve runs fractions of a GPU
    1 + N-1   one GPU has an encoder, the others have a language model each; 2 + N-2 from four GPUs on

Requests come at random times (Poisson), have 1 or 4 images of 640 by 640 pixels and get 150 tokens. Goodput
is the highest rate tried at which 99 % of the first tokens come within 2 s, and 99 % of the times between
tokens of all answers are within 100 ms; ``fails at`` is the lowest rate tried beyond it. Requests take turns
at the language models, and images at the encoders. Prompts and pixels are prepared beforehand: GPUs are
compared, not CPUs. All processes are started once, and a layout uses some of them. Embeddings travel between
processes by sockets, as bytes in the host's memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.multi_gpu_processes import Settings, answer_of, emit, start
from benchmarks.multi_gpu_replicas import Run, Shown, run_encoder, run_language_model
from benchmarks.shapes import write_checkpoint

TTFT_S, GAP_S, PERCENT = 2.0, 0.1, 99
#: Seconds that a request may take after the last one was sent.
DRAIN_S = 16.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Which of the processes a layout uses, by the numbers of their GPUs.

    Attributes:
        encoders: None for each language model's own.
    """

    name: str
    encoders: list[int] | None
    language_models: list[int]


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are made.

    Attributes:
        shape: a key of :data:`~benchmarks.shapes.SHAPES`.
        side: of the images, in pixels.
        tokens: of an answer.
        seconds: for which requests are sent at a rate.
        first_rates: requests a second for each GPU that are tried first, by number of images.
        most_rates: how many rates are tried at most.
    """

    shape: str
    side: int
    tokens: int
    seconds: float
    first_rates: dict[int, float]
    most_rates: int


GPU_LOAD = Load("qwen2-vl-2b", 640, 150, 8.0, {1: 16.0, 4: 6.0}, 12)
CPU_LOAD = Load("tiny", 112, 4, 0.5, {2: 4.0}, 1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rate gave; times in seconds, at :data:`PERCENT`."""

    rate: float
    held: bool
    ttft: float
    gap: float


def layouts(gpus: int) -> list[Layout]:
    everywhere = list(range(gpus))
    apart = [count for count in (1, 2) if count == 1 or gpus >= 4]
    return [
        Layout(f"{gpus} whole", None, everywhere),
        *(Layout(f"{n} + {gpus - n}", everywhere[:n], everywhere[n:]) for n in apart),
        Layout(f"{gpus} shared", everywhere, everywhere),
    ]


def run(settings: Settings) -> None:
    end = time.monotonic() + settings.seconds
    load = GPU_LOAD if settings.on_gpu else CPU_LOAD
    with processes(settings, load) as connections:
        searches = [(images, layout) for images in load.first_rates for layout in layouts(settings.gpus)]
        for number, (images, layout) in enumerate(searches):
            budget = (end - time.monotonic()) / (len(searches) - number)
            replicas = Replicas(connections, layout, Shown(images, load.tokens))
            replicas.at(load.first_rates[images] * settings.gpus / 2, load.seconds / 4)
            best, fails = search(
                lambda rate, seconds=load.seconds, replicas=replicas: replicas.at(rate, seconds),
                load.first_rates[images] * settings.gpus,
                time.monotonic() + budget,
                load.seconds + 4.0 * settings.on_gpu,
                load.most_rates,
            )
            figures: dict[str, Any] = {"goodput req/s": best.rate if best else 0.0}
            figures["fails at"] = fails.rate if fails else None
            if shown := best or fails:
                figures |= {"ttft p99 ms": shown.ttft * 1e3, "itl p99 ms": shown.gap * 1e3}
            emit(f"{load.shape}, {layout.name}, {images} images", **figures)


def search(
    at: Callable[[float], Outcome], rate: float, deadline: float, takes: float, most: int
) -> tuple[Outcome | None, Outcome | None]:
    """Find the highest rate that holds: first by steps, then between the two that enclose it.

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
    for _ in range(most):
        outcome = at(rate)
        if outcome.held:
            best = outcome
        else:
            fails = outcome
        if best is None:
            rate /= 1.6
        elif fails is None:
            rate *= 1.6
        else:
            rate = (best.rate * fails.rate) ** 0.5
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
        self._shown = shown
        self._seed = 0

    def at(self, rate: float, seconds: float) -> Outcome:
        """Send requests at ``rate`` a second in all for ``seconds``."""
        self._seed += 1
        count = max(2 * len(self._connections), round(rate * seconds))
        begin = time.perf_counter() + 0.3
        due = begin + np.random.default_rng(self._seed).exponential(1 / rate, count).cumsum()
        last = float(due[-1]) + DRAIN_S
        # More late first tokens than this fail the rate, so it isn't tried to its end.
        allowed = int(count * (1 - PERCENT / 100))
        for number, (_, connection) in enumerate(self._connections):
            own = due[number :: len(self._connections)].tolist()
            connection.send(Run(own, self._encoders, self._shown, last, allowed, TTFT_S))
        by_connection = {connection: (process, connection) for process, connection in self._connections}
        open_, held = set(by_connection), True
        ttfts: list[float] = []
        gaps: list[float] = [0.0]
        while open_:
            for connection in wait(list(open_)):
                open_.remove(connection)
                result = answer_of(*by_connection[connection])
                ttfts += result.ttfts
                gaps += result.gaps
                if held and not result.finished:
                    held = False
                    for other in open_:
                        other.send(None)
        ttft = float(np.percentile(ttfts, PERCENT)) if ttfts else float("inf")
        gap = float(np.percentile(gaps, PERCENT))
        outcome = Outcome(rate, held and ttft <= TTFT_S and gap <= GAP_S, ttft, gap)
        print(f"rate {rate:.2f}: {outcome}", flush=True)
        return outcome


@contextmanager
def processes(settings: Settings, load: Load) -> Iterator[list[Any]]:
    """An encoder and a language model process on each GPU; yields those of the language models."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_checkpoint(load.shape, Path(folder) / "model"))
        sockets = [f"{folder}/encoder{number}" for number in range(settings.gpus)]
        gpus = [number if settings.on_gpu else None for number in range(settings.gpus)]
        encoders = [start(run_encoder, path, *pair) for pair in zip(gpus, sockets, strict=True)]
        models = [start(run_language_model, path, gpu, sockets, load.shape, load.side) for gpu in gpus]
        try:
            for pair in (*encoders, *models):
                answer_of(*pair)
            # The encoders' sockets are there now.
            for _, connection in models:
                connection.send(list(load.first_rates))
            for pair in models:
                answer_of(*pair)
            yield models
        finally:
            for process, _ in (*models, *encoders):
                process.terminate()
            for process, _ in (*models, *encoders):
                process.join()
