"""Runs many cases, in this process or in several."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

import torch
import transformers

from tests.engine.families.drawn.run import Case

R = TypeVar("R")


def results(
    function: Callable[[Case], R], cases: Iterable[Case], jobs: int, seconds: float | None = None
) -> Iterator[R]:
    """Results of ``function`` as they come.

    Args:
        jobs: number of processes; with 1, the cases run in this one.
        seconds: time after which no further case is begun; None for all cases.
    """
    deadline = time.monotonic() + (float("inf") if seconds is None else seconds)
    due = (case for case in cases if time.monotonic() < deadline)
    if jobs == 1:
        quiet()
        yield from map(function, due)
        return
    # A GPU can't be used in a process that was forked from one that uses it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, quiet) as pool:
        running: set[Future[R]] = set()
        for case in due:
            running.add(pool.submit(function, case))
            if len(running) >= jobs:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in running:
            yield future.result()


def quiet() -> None:
    """Let a process print results alone, and use one CPU core."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("engine").setLevel(logging.ERROR)
