"""Each stage of a server dies under load: every request gets the answer that it gets alone.

The language model has two ranks, and the second one is killed, too. Afterwards nothing is left: blocks,
slots, objects in Ray's store, connections, memory. ``make chaos`` does the same for longer, and with replicas
of the ingress.
"""

import asyncio

import httpx
import pytest

from tests.chaos.application import as_before, killed_under_load
from tests.chaos.load import BODIES, Load
from tests.chaos.victims import RANK, STAGES, Killer
from tests.serving import Served

#: Ends requests that hang. A slow machine takes a minute to start a stage.
PATIENCE_S = 600.0

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2 * PATIENCE_S)]


def test_no_answer_is_lost_or_changed(served: Served) -> None:
    load = Load(lambda: httpx.AsyncClient(base_url=served.root, timeout=PATIENCE_S), clients=3)
    asyncio.run(load.learn())
    # Two at a time: a slow machine takes half a minute to start a language model.
    killer = Killer(served, [("Preprocessor", "LanguageModel"), ("VisionEncoder", RANK)], period_s=0.5)
    with as_before(served):
        # Each kind of request, streamed and whole.
        report = asyncio.run(killed_under_load(load, killer, seconds=0, least=1, answers=2 * len(BODIES)))
    assert not report.failures, report.failures[:3]
    assert not report.differences, report.differences[:3]
    assert len(report.answered) == 2 * len(BODIES) and {*killer.killed} == {*STAGES, RANK}
