"""Kills processes of an application that the test itself has started."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException

import psutil

from tests.metrics import all_answer, scraped
from tests.serving import Served, wait_for, wait_until

#: What is killed: the replicas of each stage, ranks beyond the first, and replicas of the ingress.
STAGES = ("Preprocessor", "VisionEncoder", "LanguageModel")
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


def rank_pids(replica: int) -> list[int]:
    """Process ids of the ranks that a language model's replica has started."""
    try:
        children = psutil.Process(replica).children()
        return [child.pid for child in children if "engine.executor.worker" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def everything_runs(served: Served) -> bool:
    """Return whether a replica of each of pocket's stages answers."""
    try:
        return all_answer(scraped(served.root))
    except (OSError, HTTPException):
        return False


@dataclass
class Killer:
    """Kills random processes again and again.

    Args:
        served: the application.
        kinds: what is killed.
        period_s: seconds between two kills. The next victim must be back, too.

    Attributes:
        killed: by kind.
    """

    served: Served
    kinds: Sequence[str]
    period_s: float
    seed: int = 0
    killed: Counter[str] = field(default_factory=Counter)

    async def run(self, seconds: float, answered: Callable[[], int], least: int = 2) -> None:
        """Kill for this long, and each kind this often at least.

        Args:
            answered: gives the number of answered requests. Between two kills it must grow: a slow machine
                would do nothing but restart processes.
        """
        rng = random.Random(self.seed)
        end = time.monotonic() + seconds
        while time.monotonic() < end or min(self.killed[kind] for kind in self.kinds) < least:
            # Each kind comes in each round: a short run has them all.
            for kind in rng.sample(self.kinds, len(self.kinds)):
                before = answered()
                await asyncio.sleep(self.period_s)
                await wait_until(lambda before=before: answered() > before, 600)
                victim = await asyncio.to_thread(self._victim, kind, rng)
                # It may have ended by itself, with another that was killed.
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    self.killed[kind] += 1

    def _victim(self, kind: str, rng: random.Random) -> int:
        """The process to kill, once there is one."""

        def found() -> list[int]:
            # All must be back: a process that has just begun to start is no victim.
            if not everything_runs(self.served):
                return []
            if kind == INGRESS:
                return processes_of(self.served, kind)
            replicas = processes_of(self.served, f"{'LanguageModel' if kind == RANK else kind}:pocket")
            return replicas if kind != RANK else [pid for each in replicas for pid in rank_pids(each)]

        return rng.choice(wait_for(found, 600))
