"""Exceptions planted in the parts of an engine, each raised by the work of requests marked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from engine.loading import LoadedEngine
from engine.request import Request
from engine.runner import step_arrays
from engine.scheduling.batch import ScheduledBatch, StepResult
from engine.structured.matcher import GrammarMatcher

#: Stages whose exceptions can be attributed to a request, at once or by computing its prompt apart.
ATTRIBUTED = (
    "queue",
    "cached prefix",
    "slot",
    "publication",
    "encoder rows",
    "sampling plan",
    "chunk arrays",
    "forward pass",
    "sampling",
    "grammar mask",
    "grammar",
    "prompt log-probabilities",
    "detokenizer",
    "text",
)
#: Stages whose exceptions concern every request of a step.
SHARED = ("scheduling", "result", "update")


class Planted(Exception):
    """A fault that a test has planted."""


@dataclass
class PlannedFault:
    """An exception at ``stage``, from the token ``after`` of its answer on, each time or once."""

    stage: str
    after: int = 0
    once: bool = False
    fired: int = 0


class Faults:
    """Wraps the parts of one engine.

    Attributes:
        planned: by id of the caller's request.
        shared: ids of the requests of steps in which a shared stage raised.
    """

    def __init__(self, engine: LoadedEngine, monkeypatch: Any) -> None:
        self.planned: dict[str, PlannedFault] = {}
        self.shared: set[str] = set()
        self._patch = monkeypatch
        self._slots = engine.core.scheduler.slots
        scheduler, runner, outputs = engine.core.scheduler, engine.core.runner, engine.outputs
        self._wrap(scheduler, "add", "queue", lambda request: [request])
        self._wrap(scheduler.kv, "cached_prefix", "cached prefix", lambda request: [request])
        self._wrap(scheduler.slots, "enter", "slot", lambda request, *_: [request], late=True)
        self._wrap(scheduler.kv, "publish", "publication", lambda request, *_: [request])
        self._wrap(runner, "_admit", "encoder rows", lambda request, *_: [request])
        self._wrap(runner.sampler, "plan", "sampling plan", self._of_slots)
        self._wrap(step_arrays, "_write_kv_slots", "chunk arrays", lambda _, chunk, __: [chunk.request])
        self._wrap(runner, "_mixed", "forward pass", lambda batch, *_: self._of_chunks(batch), late=True)
        self._wrap(runner.sampler, "sample", "sampling", lambda _, slots, __, **___: self._of_slots(slots))
        self._wrap(
            GrammarMatcher, "fill_mask", "grammar mask", lambda matcher, _: self._of_matchers([matcher])
        )
        self._wrap(GrammarMatcher, "accept", "grammar", lambda matcher, _: self._of_matchers([matcher]))
        self._wrap(runner._scorer, "score", "prompt log-probabilities", lambda chunk, _: [chunk.request])
        self._wrap(outputs, "_add", "detokenizer", lambda group: group.requests)
        self._wrap(outputs, "_extend", "text", lambda _, __, sequence, *___: [sequence.request])
        self._wrap(scheduler, "_retire_full_rows", "scheduling", self._of_slots)
        self._wrap(scheduler, "update", "update", lambda batch, _: self._of_batch(batch))
        self._plant_results(runner)
        fill = GrammarMatcher.fill_masks

        def fill_masks(matchers: list[tuple[GrammarMatcher, int]], mask: Any) -> None:
            self.check("grammar mask", self._of_matchers(matcher for matcher, _ in matchers))
            fill(matchers, mask)

        monkeypatch.setattr(GrammarMatcher, "fill_masks", staticmethod(fill_masks))

    def check(self, stage: str, requests: Iterable[Request]) -> None:
        """Raise if one of ``requests`` is marked for ``stage``."""
        requests = list(requests)
        for request in requests:
            fault = self.planned.get(_key(request))
            if fault is None or fault.stage != stage or (fault.once and fault.fired):
                continue
            if fault.after and self._answered(request) < fault.after:
                continue
            fault.fired += 1
            if stage in SHARED:
                # Where no step comes about, all that run are concerned.
                concerned = (
                    self._of_slots(range(len(self._slots.requests))) if stage == "scheduling" else requests
                )
                self.shared |= {_key(request) for request in concerned}
            raise Planted(f"{stage} of {request.id}")

    def _answered(self, request: Request) -> int:
        known = len(request.token_ids) if request.slot is None else int(self._slots.known[request.slot])
        return known - request.num_prompt

    def _wrap(
        self,
        owner: Any,
        name: str,
        stage: str,
        requests_of: Callable[..., Iterable[Request]],
        late: bool = False,
    ) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **options: Any) -> Any:
            requests = list(requests_of(*args, **options))
            if not late:
                self.check(stage, requests)
            result = original(*args, **options)
            if late:
                self.check(stage, requests)
            return result

        self._patch.setattr(owner, name, wrapper)

    def _plant_results(self, runner: Any) -> None:
        compute, check = runner.compute, self.check

        class Pending:
            def __init__(self, pending: Any, requests: list[Request]) -> None:
                self.pending, self.requests = pending, requests

            def result(self) -> StepResult:
                check("result", self.requests)
                return self.pending.result()

        self._patch.setattr(
            runner,
            "compute",
            lambda step, mask=None: Pending(compute(step, mask), self._of_batch(step.batch)),
        )

    def _of_slots(self, slots: Any) -> list[Request]:
        count = len(self._slots.requests)
        found = [self._slots.requests[int(slot)] for slot in slots if int(slot) < count]
        return [request for request in found if request is not None]

    def _of_chunks(self, batch: ScheduledBatch) -> list[Request]:
        return [chunk.request for chunk in batch.prefills]

    def _of_batch(self, batch: ScheduledBatch) -> list[Request]:
        return [*self._of_slots(batch.decode_slots), *self._of_chunks(batch)]

    def _of_matchers(self, matchers: Iterable[GrammarMatcher]) -> list[Request]:
        wanted = {id(matcher) for matcher in matchers}
        running = [request for request in self._slots.requests if request is not None]
        return [request for request in running if id(request.grammar) in wanted]


def _key(request: Request) -> str:
    return request.id.split("/")[0]
