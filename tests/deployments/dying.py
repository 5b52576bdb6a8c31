"""Stages that die at points that a test plants, around the stages of an application in this process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field

import httpx

from deployments.api import create_api
from deployments.config import AppConfig, ReplayConfig
from deployments.pipeline import Pipeline
from deployments.stages import RowsLost, StageLost, Stages
from tests.deployments.asgi import AppTransport


@dataclass
class Deaths:
    """A plan of the places where work on requests is lost.

    Attributes:
        planted: points still to come, in order: the name of a call, and whether it has done its work. For
            ``update`` the number of updates that come before.
        happened: those that came.
        seeds: those of the generations that were begun.
    """

    planted: list[tuple[str, int]] = field(default_factory=list)
    happened: list[tuple[str, int]] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)

    def check(self, name: str, when: int, kind: type[StageLost] = StageLost) -> None:
        """Raise if this point is the next that is planted."""
        if self.planted and self.planted[0] == (name, when):
            self.happened.append(self.planted.pop(0))
            raise kind(f"planted: {name} {when}")


class DyingStage:
    """A stage whose calls die.

    Args:
        stage: does the work.
        deaths: where it dies.
    """

    def __init__(self, stage, deaths: Deaths) -> None:
        self._stage, self._deaths = stage, deaths

    async def _call(self, name: str, *args):
        self._deaths.check(name, 0)
        result = await getattr(self._stage, name)(*args)
        self._deaths.check(name, 1)
        return result

    async def collect(self):
        return await self._stage.collect()

    async def prepare(self, *args):
        return await self._call("prepare", *args)

    async def encode(self, *args):
        return await self._call("encode", *args)

    async def max_model_len(self):
        return await self._call("max_model_len")

    async def embed(self, request, media):
        self._deaths.check("rows", 0, RowsLost)
        return await self._call("embed", request, media)

    async def generate(self, request, media, relay):
        self._deaths.seeds.append(request.params.seed)
        self._deaths.check("rows", 0, RowsLost)
        count = 0
        self._deaths.check("update", count)
        async with aclosing(self._stage.generate(request, media)) as updates:
            async for update in updates:
                if relay is None or not relay.takes(update):
                    yield update
                count += 1
                self._deaths.check("update", count)
                if update.finished:
                    self._deaths.check("end", 0)


def dying_client(
    spec_name: str, config: AppConfig, stages: Stages, deaths: Deaths, replay: ReplayConfig
) -> httpx.AsyncClient:
    """A client of an application whose one model's stages die."""
    (spec,) = [spec for spec in config.models if spec.name == spec_name]
    wrapped: Sequence = [
        None if stage is None else DyingStage(stage, deaths)
        for stage in (stages.language_model, stages.preprocessor, stages.encoder)
    ]
    pipeline = Pipeline(spec, Stages(*wrapped), ThreadPoolExecutor(1), replay)
    api = create_api(config.ingress, {spec.name: pipeline})
    return httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60)
