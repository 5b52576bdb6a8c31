"""Runs many cases, in this process or in several."""

from __future__ import annotations

import logging
import multiprocessing
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

import torch
import transformers

from tests.engine.families.drawn.run import Case

R = TypeVar("R")


def results(
    function: Callable[[Case], R],
    lost: Callable[[Case], R],
    cases: Iterable[Case],
    jobs: int,
    seconds: float | None = None,
) -> Iterator[R]:
    """Results of ``function`` as they come.

    Args:
        lost: gives the result of a case that has ended its process. The other cases go on.
        jobs: number of processes; with 1, the cases run in this one.
        seconds: time after which no further case is begun; None for all cases.
    """
    deadline = time.monotonic() + (float("inf") if seconds is None else seconds)
    due = (case for case in cases if time.monotonic() < deadline)
    if jobs == 1:
        quiet()
        yield from map(function, due)
        return
    processes: queue.SimpleQueue[_Process[R]] = queue.SimpleQueue()
    for _ in range(jobs):
        processes.put(_Process(function, lost))
    with ThreadPoolExecutor(jobs) as threads:
        running: set[Future[R]] = set()
        for case in due:
            running.add(threads.submit(_run, processes, case))
            if len(running) >= jobs:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in running:
            yield future.result()
    for _ in range(jobs):
        processes.get().close()


def _run(processes: queue.SimpleQueue[_Process[R]], case: Case) -> R:
    """The result of ``case`` in a process that is free."""
    process = processes.get()
    try:
        return process.run(case)
    finally:
        processes.put(process)


class _Process(Generic[R]):
    """A process that runs one case after the other. A new one takes its place if a case ends it."""

    def __init__(self, function: Callable[[Case], R], lost: Callable[[Case], R]) -> None:
        self._function, self._lost = function, lost
        self._pool = self._started()

    def run(self, case: Case) -> R:
        try:
            found = self._pool.submit(self._function, case).result()
            if getattr(found, "crashed", False):
                # The GPU may be lost to the process.
                self.close()
                self._pool = self._started()
            return found
        except BrokenProcessPool:
            self._pool = self._started()
            return self._lost(case)

    def close(self) -> None:
        self._pool.shutdown()

    @staticmethod
    def _started() -> ProcessPoolExecutor:
        # A GPU can't be used in a process that was forked from one that uses it.
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quiet)


def quiet() -> None:
    """Let a process print results alone, and use one CPU core."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("engine").setLevel(logging.ERROR)
