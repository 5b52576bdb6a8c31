"""The engine's loop: schedule, execute, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from engine.request import Request
from engine.scheduling.batch import ScheduledBatch, StepEvents, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.structured.matcher import GrammarMatcher

GrammarMask = Callable[[list[int]], np.ndarray]


class PendingStep(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Wait for it."""


class Runner(Protocol):
    """What computes steps; see :class:`engine.runner.model_runner.ModelRunner`."""

    @property
    def vocab_size(self) -> int: ...

    def execute(self, batch: ScheduledBatch, grammar_mask: GrammarMask | None = None) -> PendingStep: ...

    def check_idle(self) -> None: ...

    def check_health(self) -> None:
        """Raise Unavailable if it can't compute any more."""

    def close(self) -> None:
        """End what runs for it in other processes; may be called repeatedly."""


class EngineCore:
    """Owns a scheduler and a runner; used by one thread.

    Args:
        scheduler: decides what each step computes.
        runner: computes it.
        run_ahead: steps that are enqueued before the oldest one's tokens are read. The device feeds sampled
            tokens to the next step by itself; a request that ends is noticed that many steps late, and what
            was computed for it meanwhile is dropped.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, run_ahead: int) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._run_ahead = run_ahead
        self._in_flight: deque[tuple[ScheduledBatch, PendingStep]] = deque()
        self._ready: list[StepEvents] = []

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        self.scheduler.abort(request)
        request.embeddings.clear()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> list[StepEvents]:
        """Enqueue the next step, and return what finished steps gave."""
        batch = self.scheduler.schedule()
        if batch is not None:
            self._note_admissions(batch)
            pending = self.runner.execute(batch, self._grammar_mask(batch))
            self._in_flight.append((batch, pending))
        while len(self._in_flight) > (self._run_ahead if batch is not None else 0):
            self._collect()
        ready, self._ready = self._ready, []
        return ready

    def _collect(self) -> None:
        """Wait for the oldest step in flight and take in its tokens."""
        batch, pending = self._in_flight.popleft()
        result = pending.result()
        constrained = np.flatnonzero(self.scheduler.slots.constrained[batch.sampling_slots])
        events = self.scheduler.update(batch, result.tokens)
        for row in constrained.tolist():
            request = events.requests[row]
            if request is not None and request.grammar is not None and row not in events.finished:
                request.grammar.accept([int(result.tokens[row])])
        events.logprobs = result.logprobs
        events.prompt_logprobs = result.prompt_logprobs
        vectors = dict(result.pooled)
        events.pooled = [(request, vectors[request]) for request in self.scheduler.finish_pooling(batch)]
        for ended in [*(events.requests[row] for row in events.finished), *vectors]:
            if ended is not None and ended.finished:
                ended.embeddings.clear()
        self._ready.append(events)

    def _grammar_mask(self, batch: ScheduledBatch) -> GrammarMask | None:
        """A callback that masks the constrained rows of ``batch``, or None if there are none.

        The runner calls it when the forward pass is already enqueued: reading the previous tokens and
        computing the masks happen while the device works.
        """
        table = self.scheduler.slots
        if not table.constrained[batch.sampling_slots].any():
            return None

        def fill(slots: list[int]) -> np.ndarray:
            while self._in_flight:
                self._collect()
            words = -(-self.runner.vocab_size // 32)
            mask = np.full((len(slots), words), -1, np.int32)
            rows = np.flatnonzero(table.constrained[slots]).tolist()
            # Those that ended meanwhile have left their rows.
            requests = [(table.requests[slots[row]], row) for row in rows]
            if matchers := [(request.grammar, row) for request, row in requests if request is not None]:
                GrammarMatcher.fill_masks(matchers, mask)
            return mask

        return fill

    def _note_admissions(self, batch: ScheduledBatch) -> None:
        now = time.monotonic()
        for admission in batch.admitted:
            if admission.request.admitted_at is None:
                admission.request.admitted_at = now

    def check_integrity(self) -> None:
        """At idle: nothing is held anywhere. Raises AssertionError."""
        assert not self._in_flight, "steps are still in flight"
        self.scheduler.check_integrity()
        self.runner.check_idle()
