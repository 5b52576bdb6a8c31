"""Kills processes of an application that the test itself has started."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil

from tests.serving import Served

#: What is killed: the replicas of each stage, and ranks beyond the first.
STAGES = ("Preprocessor", "VisionEncoder", "LanguageModel")
RANK = "rank"


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


def rank_pids(replica: int) -> list[int]:
    """Process ids of the ranks that a language model's replica has started."""
    try:
        children = psutil.Process(replica).children()
        return [child.pid for child in children if "engine.executor.worker" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


@dataclass
class Killer:
    """Kills a random stage's process again and again.

    Args:
        served: the application.
        period_s: seconds between two kills. The next victim's stage must be back, too: where machines are
            slow, nothing would ever be answered otherwise.
        ranks: whether the language model has further ranks.

    Attributes:
        killed: by what was killed.
    """

    served: Served
    period_s: float
    ranks: bool
    seed: int = 0
    killed: Counter[str] = field(default_factory=Counter)

    async def run(self, seconds: float) -> None:
        """Kill for this long."""
        rng = random.Random(self.seed)
        end = time.monotonic() + seconds
        kinds = [*STAGES, RANK] if self.ranks else list(STAGES)
        while time.monotonic() < end:
            # Each kind comes in each round: a short run has them all.
            for kind in rng.sample(kinds, len(kinds)):
                await asyncio.sleep(self.period_s)
                if time.monotonic() >= end:
                    return
                if (pid := await asyncio.to_thread(self._victim, kind, rng)) is not None:
                    os.kill(pid, signal.SIGKILL)
                    self.killed[kind] += 1

    def _victim(self, kind: str, rng: random.Random) -> int | None:
        """The process to kill, once there is one; None if none comes up for long."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            replicas = replica_pids(self.served, f"{'LanguageModel' if kind == RANK else kind}:pocket")
            found = replicas if kind != RANK else [pid for each in replicas for pid in rank_pids(each)]
            if found:
                return rng.choice(found)
            time.sleep(0.2)
        return None
