"""Processes of a server die under load: every request gets the answer that it gets alone.

``make chaos`` goes on for ten minutes, and kills each kind of process twice at least. Without
``CHAOS_SECONDS`` these tests are skipped: every restart takes a busy machine of two cores most of a minute.
"""

import asyncio
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.load import Load, Report
from tests.chaos.victims import INGRESS, RANK, STAGES, Killer, processes_of
from tests.metrics import is_idle, scraped
from tests.serving import Served, served_application, wait_for

#: Seconds of killing, at least; seconds between two kills.
SECONDS = float(os.environ.get("CHAOS_SECONDS", "0"))
PERIOD_S = float(os.environ.get("CHAOS_PERIOD", "5"))
CLIENTS = 4

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(SECONDS + 1800),
    pytest.mark.skipif(not SECONDS, reason="runs with CHAOS_SECONDS, as by make chaos"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    """The application as the README says for load, behind HAProxy, with a language model of two ranks."""

    def change(args: dict[str, Any]) -> None:
        args["models"] = args["models"][:1]
        args["models"][0]["engine"]["tensor_parallel_size"] = 2
        for stage in ("preprocessor", "encoder", "language_model"):
            args["models"][0][stage]["env"] = {"OMP_NUM_THREADS": "1"}
        # However long a slow machine takes to replace a process.
        args["ingress"]["replay"] = {"max_losses": 1000, "patience_s": 900}

    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    folder = tmp_path_factory.mktemp("chaos")
    with served_application(folder, change, environment=environment, connect=False) as served:
        yield served


def stored(served: Served) -> list[str]:
    """References to objects that a process has put into the store: pixels and embedding rows."""
    from ray._private.internal_api import memory_summary

    # Ids of results count from 1, those of objects that were put from 100 million; little-endian.
    return re.findall(r".*[0-9a-f]{2}e1f505\b.*", memory_summary(served.cluster))


def ingress(served: Served) -> psutil.Process:
    (pid,) = processes_of(served, INGRESS)
    return psutil.Process(pid)


async def run(load: Load, killer: Killer, seconds: float) -> Report:
    """Kill processes under load, and return what became of the requests."""
    began = time.monotonic()
    running = asyncio.ensure_future(load.run())
    await killer.run(seconds, load.report.answered.total)
    load.stopping = True
    report = await running
    print(
        f"{time.monotonic() - began:.0f} s: killed {dict(killer.killed)}; {report.answered.total()} answers, "
        f"the longest in {report.longest_s:.0f} s; asked again {report.asked_again} times"
    )
    return report


def wait_until_nothing_is_left(served: Served) -> None:
    wait_for(lambda: is_idle(scraped(served.root)))
    # Pixels and rows are kept for some seconds after their use.
    wait_for(lambda: not stored(served))


def test_no_answer_is_lost_or_changed_and_nothing_stays_behind(served):
    load = Load(lambda: httpx.AsyncClient(base_url=served.root, timeout=1800), CLIENTS)
    asyncio.run(load.learn())
    # Everything has been used once: what grows from here on has leaked.
    process = ingress(served)
    connections, memory = len(process.net_connections()), process.memory_info().rss
    killer = Killer(served, [*STAGES, RANK], PERIOD_S)
    report = asyncio.run(run(load, killer, SECONDS))
    assert not report.failures, report.failures[:3]
    assert not report.differences, report.differences[:3]
    assert not report.asked_again and min(killer.killed.values()) >= 2
    wait_until_nothing_is_left(served)
    # Every replica has connections of its own; those of dead replicas are closed.
    wait_for(lambda: len(process.net_connections()) <= connections + 8)
    assert process.memory_info().rss <= memory + (100 << 20)


def test_clients_that_ask_again_survive_the_ingress(served):
    load = Load(lambda: httpx.AsyncClient(base_url=served.root, timeout=1800), CLIENTS, again_s=1200)
    asyncio.run(load.learn())
    killer = Killer(served, [INGRESS], PERIOD_S)
    report = asyncio.run(run(load, killer, SECONDS / 10))
    assert not report.failures, report.failures[:3]
    assert not report.differences, report.differences[:3]
    assert report.asked_again and killer.killed[INGRESS] >= 2
    wait_until_nothing_is_left(served)
