"""Processes of a server die under load: every request gets the answer that it gets alone.

``make chaos`` goes on for ten minutes, and kills each kind of process twice at least. Without
``CHAOS_SECONDS`` these tests are skipped: every restart takes a busy machine of two cores most of a minute.
``test_short.py`` always runs.
"""

import asyncio
import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.chaos.application import (
    application,
    as_before,
    killed_under_load,
    on_cpus,
    wait_until_nothing_is_left,
)
from tests.chaos.load import Load
from tests.chaos.victims import ENGINE, INGRESS, RANK, STAGES, Killer, nothing_hangs
from tests.serving import Served, wait_for

#: Seconds of killing, at least; seconds between two kills.
SECONDS = float(os.environ.get("CHAOS_SECONDS", "0"))
PERIOD_S = float(os.environ.get("CHAOS_PERIOD", "5"))
CLIENTS = 4

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(SECONDS + 1800),
    pytest.mark.skipif(not SECONDS, reason="runs with CHAOS_SECONDS, as by make chaos"),
]


@pytest.fixture(scope="module", params=[True, False], ids=["haproxy", "proxy"])
def served(request, tmp_path_factory) -> Iterator[Served]:
    """The application as the README says for load, and as it says for a first try."""
    with application(tmp_path_factory.mktemp("chaos"), on_cpus, haproxy=request.param) as served:
        yield served


def load_of(served: Served, again_s: float = 0.0) -> Load:
    """A load that knows its answers."""
    load = Load(lambda: httpx.AsyncClient(base_url=served.root, timeout=1800), CLIENTS, again_s=again_s)
    asyncio.run(load.learn())
    return load


def test_no_answer_is_lost_or_changed_and_nothing_stays_behind(served):
    load = load_of(served)
    killer = Killer(served, [*STAGES, ENGINE, RANK], PERIOD_S)
    with as_before(served):
        report = asyncio.run(killed_under_load(load, killer, SECONDS))
    assert not report.failures, report.failures[:3]
    assert not report.differences, report.differences[:3]
    assert not report.asked_again and min(killer.killed.values()) >= 2


def test_processes_that_hang_are_replaced(served):
    """Each is found by three checks of its health in a row."""
    load = load_of(served)
    killer = Killer(served, [*STAGES, ENGINE], PERIOD_S, by=signal.SIGSTOP)
    with as_before(served):
        report = asyncio.run(killed_under_load(load, killer, SECONDS / 10, least=1))
        # The last one may not have been found yet, and what is left in the store is asked of all processes.
        wait_for(lambda: nothing_hangs(served), 600)
    assert not report.failures, report.failures[:3]
    assert not report.differences, report.differences[:3]
    assert not report.asked_again and min(killer.killed.values()) >= 1


def test_clients_that_ask_again_survive_the_ingress(served):
    load = load_of(served, again_s=1200)
    killer = Killer(served, [INGRESS], PERIOD_S)
    report = asyncio.run(killed_under_load(load, killer, SECONDS / 10))
    assert not report.failures, report.failures[:3]
    assert not report.differences, report.differences[:3]
    assert report.asked_again and killer.killed[INGRESS] >= 2
    wait_until_nothing_is_left(served)
