"""Kills processes of an application that the test itself has started."""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException

import psutil

from tests.metrics import all_answer, scraped
from tests.serving import Served, wait_until

#: What is killed: the replicas of each stage, the engines of language models, ranks beyond the first, and
#: replicas of the ingress.
STAGES = ("Preprocessor", "VisionEncoder", "LanguageModel")
ENGINE = "engine"
RANK = "rank"
INGRESS = "Ingress"


def replica_pids(served: Served, deployment: str) -> list[int]:
    """Process ids of a deployment's running replicas; only of the cluster that ``served`` has started."""
    import ray
    from ray import serve

    controller = serve.context._get_global_client()._controller
    details = ray.get(controller.get_serve_instance_details.remote())
    replicas = details["applications"]["sightline"]["deployments"][deployment]["replicas"]
    own = {child.pid for child in served.process.children(recursive=True)}
    running = [replica["pid"] for replica in replicas if replica["state"] == "RUNNING" and replica["pid"]]
    return [pid for pid in running if pid in own]


def processes_of(served: Served, deployment: str) -> list[int]:
    """Process ids of a deployment's replicas, of those that start as well; needs no connection to Ray."""
    # Ray puts the class of a replica into its title, and its whole name before the replica is ready.
    title = re.compile(rf"ray::.*(ServeReplica:sightline:|sightline#){re.escape(deployment)}(?![\w-])")
    found = []
    for child in served.process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title.match(" ".join(child.cmdline())):
                found.append(child.pid)
    return found


def rank_pids(processes: Iterable[psutil.Process]) -> list[int]:
    """Process ids of those that are ranks beyond a language model's first."""
    return _pids_that_run("engine.executor.worker", processes)


def _pids_that_run(module: str, processes: Iterable[psutil.Process]) -> list[int]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if module in process.cmdline():
                found.append(process.pid)
    return found


def _is_stopped(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def everything_runs(served: Served) -> bool:
    """Return whether a replica of each of pocket's stages answers."""
    try:
        return all_answer(scraped(served.root))
    except (OSError, HTTPException):
        return False


def nothing_hangs(served: Served) -> bool:
    """Return whether no process is stopped, and a replica of each of pocket's stages answers."""
    stopped = any(_is_stopped(child.pid) for child in served.process.children(recursive=True))
    return not stopped and everything_runs(served)


@dataclass
class Killer:
    """Kills random processes again and again.

    Args:
        served: the application.
        kinds: what is killed; the kinds of a tuple are killed at the same time.
        period_s: seconds between two kills. The next victims must be back, too.
        by: how. SIGSTOP leaves a process that does nothing: others must notice, and kill it.

    Attributes:
        killed: by kind.
    """

    served: Served
    kinds: Sequence[str | tuple[str, ...]]
    period_s: float
    by: signal.Signals = signal.SIGKILL
    seed: int = 0
    killed: Counter[str] = field(default_factory=Counter)

    async def run(
        self, seconds: float, answered: Callable[[], int], least: int = 2, most_s: float = math.inf
    ) -> None:
        """Kill for ``seconds``, and on until each kind was killed ``least`` times.

        Args:
            answered: gives the number of answered requests. Between two kills it must grow: a slow machine
                would do nothing but restart processes.
            most_s: most seconds, even if a kind was killed less often.
        """
        rng = random.Random(self.seed)
        began = time.monotonic()
        groups = [(kind,) if isinstance(kind, str) else kind for kind in self.kinds]

        def goes_on() -> bool:
            lived = time.monotonic() - began
            missing = any(self.killed[kind] < least for group in groups for kind in group)
            return lived < seconds or (missing and lived < most_s)

        while goes_on():
            # Each kind comes in each round: a short run has them all.
            for group in rng.sample(groups, len(groups)):
                before = answered()
                await asyncio.sleep(self.period_s)
                await wait_until(lambda before=before: answered() > before, 600)
                for kind, pids in (await self._victims(group)).items():
                    # It may have ended together with another one that was killed.
                    with suppress(ProcessLookupError):
                        os.kill(rng.choice(pids), self.by)
                        self.killed[kind] += 1

    async def _victims(self, kinds: Sequence[str]) -> dict[str, list[int]]:
        """The processes of these kinds, once each kind has some."""
        deadline = time.monotonic() + 600
        while True:
            # One look per thread: if the wait is cancelled, no thread keeps polling.
            processes = await asyncio.to_thread(self.running, kinds)
            if processes and all(processes.values()):
                return processes
            assert time.monotonic() < deadline, f"no process of {kinds} came back"
            await asyncio.sleep(0.1)

    def running(self, kinds: Sequence[str]) -> dict[str, list[int]]:
        """The processes of these kinds; nothing while a stage does not answer: its process has just begun."""
        return {kind: self._processes(kind) for kind in kinds} if everything_runs(self.served) else {}

    def _processes(self, kind: str) -> list[int]:
        return [pid for pid in self._all_processes(kind) if not _is_stopped(pid)]

    def _all_processes(self, kind: str) -> list[int]:
        if kind == INGRESS:
            return processes_of(self.served, kind)
        if kind == RANK:
            return rank_pids(self.served.process.children(recursive=True))
        if kind == ENGINE:
            module = "deployments.ray_serve.engine_server"
            return _pids_that_run(module, self.served.process.children(recursive=True))
        return processes_of(self.served, f"{kind}:pocket")
