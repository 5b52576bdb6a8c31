"""Each stage of a server dies under load: every request gets the answer that it gets alone.

The processes of engines die, too. A second model makes vectors. Its language model has two ranks, and the
second one is killed. Afterwards nothing is left: blocks, slots, objects in Ray's store, connections, memory.
``make chaos`` does the same for longer, with ranks that make tokens, and with replicas of the ingress.
"""

import asyncio
from functools import partial
from typing import Any

import httpx
import pytest

from tests.chaos.application import as_before, killed_under_load
from tests.chaos.load import BODIES, VECTORS, Load
from tests.chaos.victims import ENGINE, RANK, STAGES, Killer
from tests.serving import Served

#: Ends requests that hang. A slow machine takes a minute to start a stage.
PATIENCE_S = 600.0

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2 * PATIENCE_S)]


def test_no_answer_is_lost_or_changed(served: Served) -> None:
    bodies = BODIES | VECTORS

    def load(bodies: dict[str, dict[str, Any]], requests: int | None = None) -> Load:
        client = partial(httpx.AsyncClient, base_url=served.root, timeout=PATIENCE_S)
        return Load(client, 3, requests, bodies=bodies, pause_s=0.3)

    killed = load(bodies)
    asyncio.run(killed.learn())
    kinds = [("Preprocessor", "LanguageModel"), ("VisionEncoder", RANK, ENGINE)]
    # Some at a time: a slow machine takes half a minute to start a language model.
    killer = Killer(served, kinds, period_s=0.5)
    with as_before(served):
        # Each kind of request, streamed and whole; and once more those that ranks answer.
        report = asyncio.run(killed_under_load(killed, killer, seconds=0, least=1, answers=2 * len(bodies)))
        after = load(VECTORS, len(VECTORS))
        after.wanted = killed.wanted
        again = asyncio.run(after.run())
    assert not report.failures + again.failures, (report.failures + again.failures)[:3]
    assert not report.differences + again.differences, (report.differences + again.differences)[:3]
    assert len(report.answered) == 2 * len(bodies) and len(again.answered) == len(VECTORS)
    assert {*killer.killed} == {*STAGES, RANK, ENGINE}
