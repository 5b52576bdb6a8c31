"""Collects the metrics of all processes of the application for ``/metrics``."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from deployments.errors import logger
from deployments.metrics.families import Counter, Family, Part
from deployments.metrics.ingress import HttpMeter, ModelMeter

#: Returns the metrics of all replicas of a stage or of the ingress.
Source = Callable[[], Awaitable[list[Part]]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's metrics: those that this process keeps, and those that each of its stages gives.

    Attributes:
        ways: see :func:`deployments.stages.ways_to`.
        may_sleep: the stages that may have no replica while they are idle.
    """

    meter: ModelMeter
    stages: Mapping[str, Source]
    ways: Sequence[Counter]
    may_sleep: Set[str]


class Measurable(Protocol):
    """A source of a model's metrics."""

    def measured(self) -> Measured: ...


class Collector:
    """Asks every replica for its metrics when they are wanted.

    Args:
        http: of this process.
        models: by name.
        replica: the name of this ingress replica.
        ingress: returns what :meth:`own` returns in each replica of the ingress; None: this is the only one.

    Attributes:
        timeout: seconds to wait for a stage. One that doesn't answer is left out of the result.
    """

    def __init__(
        self,
        http: HttpMeter,
        models: Mapping[str, Measurable],
        timeout: float,
        *,
        replica: str = "local",
        ingress: Source | None = None,
    ) -> None:
        self._http = http
        self._models = models
        self.timeout = timeout
        self._replica = replica
        self._ingress = ingress

    def own(self) -> list[Part]:
        """The metrics that this process keeps."""
        parts = [Part({"replica": self._replica}, self._http.families())]
        for name, model in self._models.items():
            measured = model.measured()
            families = [*measured.meter.families(), *(each.family() for each in measured.ways)]
            parts.append(Part({"model": name, "replica": self._replica}, families))
        return parts

    async def collect(self) -> list[Part]:
        """The metrics of all replicas of all stages and of the ingress."""
        sources: list[tuple[dict[str, str], Source]] = []
        may_sleep: list[tuple[dict[str, str], float]] = []
        for name, model in self._models.items():
            measured = model.measured()
            for stage, source in measured.stages.items():
                labels = {"model": name, "stage": stage}
                sources.append((labels, source))
                may_sleep.append((labels, stage in measured.may_sleep))
        asked = [self._ask(source) for _, source in sources]
        mine = self._ask(self._ingress) if self._ingress is not None else _already(self.own())
        parts, *found = await asyncio.gather(mine, *asked)
        counts = []
        for (labels, _), replicas in zip(sources, found, strict=True):
            counts.append((labels, len(replicas)))
            parts += [Part({**labels, **part.labels}, part.families) for part in replicas]
        parts.append(Part({}, [_replicas(counts), _may_sleep(may_sleep)]))
        return parts

    async def _ask(self, source: Source) -> list[Part]:
        try:
            return await asyncio.wait_for(source(), self.timeout)
        except Exception as error:
            logger.warning("metrics of a part of the server are missing: %r", error)
            return []


async def _already(parts: list[Part]) -> list[Part]:
    return parts


def _may_sleep(stages: Sequence[tuple[dict[str, str], float]]) -> Family:
    return Family(
        "sightline_stage_may_sleep",
        "gauge",
        "1 for a stage that may have no replica while it is idle, since its min_replicas is 0; else 0.",
        list(stages),
    )


def _replicas(counts: Sequence[tuple[dict[str, str], int]]) -> Family:
    return Family(
        "sightline_stage_replicas",
        "gauge",
        "Replicas of the stage that have answered with their metrics.",
        list(counts),
    )
