"""Engines and a rank die under load, without Ray: every request gets the answer that it gets alone."""

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import httpx
import psutil
import pytest

from deployments.api import create_api
from deployments.config import AppConfig, ReplayConfig
from deployments.in_process import LocalModel
from deployments.language_model import LanguageModel
from deployments.pipeline import Pipeline
from deployments.stages import StageLost, Stages
from deployments.tracing import Tracer
from tests.chaos.load import BODIES, Load
from tests.chaos.victims import rank_pids
from tests.deployments.asgi import AppTransport
from tests.serving import app_args, changed_config, wait_until

pytestmark = pytest.mark.processes

#: Requests, how many at a time, and after how many answers another engine is killed.
REQUESTS, CLIENTS, BETWEEN_KILLS = 2 * len(BODIES), 4, 4


class Replaced:
    """A language model stage whose engine can be killed. Calls wait for the next.

    Args:
        load: loads the engine of a number, from 0 on.
    """

    def __init__(self, load: Callable[[int], LanguageModel]) -> None:
        self._load = load
        self.replica = load(0)
        self._ready = asyncio.Event()
        self._ready.set()
        self.dead: list[LanguageModel] = []
        self.ranks_killed = 0

    async def kill(self) -> None:
        self._ready.clear()
        self.dead.append(self.replica)
        if ranks := rank_pids(psutil.Process().children()):
            died = threading.Event()
            self.replica.when_dead(died.set)
            os.kill(ranks[0], signal.SIGKILL)
            await wait_until(died.is_set)
            self.ranks_killed += 1
        else:
            self.replica._engine._die(RuntimeError("killed by the test"))
        self.replica = await asyncio.to_thread(self._load, len(self.dead))
        self._ready.set()

    async def max_model_len(self):
        await self._ready.wait()
        return await self.replica.max_model_len()

    async def generate(self, request, media, relay):
        await self._ready.wait()
        async with aclosing(self.replica.generate(request, media, relay)) as updates:
            async for update in updates:
                yield update

    def close(self) -> None:
        for replica in (*self.dead, self.replica):
            replica.close()


class Mortal:
    """A preprocessor or encoder of which every third call is lost, before or after its work."""

    def __init__(self, stage, rng: random.Random) -> None:
        self._stage, self._rng = stage, rng
        self.deaths = 0
        self.immortal = True

    async def _call(self, method, *args):
        late = self._rng.random() < 0.5
        dies = not self.immortal and self._rng.random() < 1 / 3
        if dies and not late:
            self.deaths += 1
            raise StageLost("killed by the test")
        result = await method(*args)
        if dies:
            self.deaths += 1
            raise StageLost("killed by the test")
        return result

    async def prepare(self, *args):
        return await self._call(self._stage.prepare, *args)

    async def encode(self, *args):
        return await self._call(self._stage.encode, *args)


async def test_no_answer_is_lost_or_changed():
    config = AppConfig.model_validate(app_args())
    spec, rng = config.models[0], random.Random(0)
    local = LocalModel(spec, config, Tracer())
    # The second engine has two ranks: another process, which is killed.
    engines = {1: changed_config(tensor_parallel_size=2).models[0].engine}
    model = Replaced(lambda number: LanguageModel.load(engines.get(number, spec.engine)))
    preprocessor, encoder = (Mortal(stage, rng) for stage in (local.preprocessor, local.encoder))
    replay = ReplayConfig(max_losses=100, patience_s=300, pause_s=0.01)
    pipeline = Pipeline(spec, Stages(model, preprocessor, encoder), ThreadPoolExecutor(2), replay)
    transport = AppTransport(create_api(config.ingress, {spec.name: pipeline}))
    load = Load(
        lambda: httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300),
        CLIENTS,
        REQUESTS,
    )
    try:
        await load.learn()
        preprocessor.immortal = encoder.immortal = False
        running = asyncio.ensure_future(load.run())
        for kills in range(REQUESTS // BETWEEN_KILLS - 1):
            answered = kills * BETWEEN_KILLS
            await wait_until(
                lambda answered=answered: (
                    (load.report.answered.total() >= answered and model.replica.metrics()["running"] > 0)
                    or running.done()
                ),
                300,
            )
            await model.kill()
        report = await running
        assert not report.failures, report.failures[:3]
        assert not report.differences, report.differences[:3]
        assert report.answered.total() == REQUESTS
        assert len(model.dead) >= 2 and model.ranks_killed == 1 and preprocessor.deaths and encoder.deaths
        await wait_until(model.replica.is_idle)
    finally:
        model.close()
        await local.close()
