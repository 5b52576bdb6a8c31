"""The engine's loop: schedule, execute, update.

An exception of one request's work ends that request, and no other: see :mod:`engine.scheduling.recovery`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np

from engine.request import Request, RequestFault
from engine.scheduling import recovery
from engine.scheduling.batch import ScheduledBatch, StepEvents, StepResult
from engine.scheduling.pace import StepPace
from engine.scheduling.scheduler import Scheduler
from engine.structured.matcher import GrammarMatcher

logger = logging.getLogger(__name__)

#: Words of a mask by which states of grammars are told apart: those of the vocabulary's commonest tokens.
_FIRST_WORDS = 512

#: Writes the masks of the rows that sample in these slots, int32 ``(R, ceil(V / 32))``. Returns the tokens
#: that each expected chunk computes behind its first one; None if other ones must follow that.
GrammarMask = Callable[[list[int], np.ndarray], list[list[int] | None]]


class PendingStep(Protocol):
    """An enqueued step."""

    def result(self) -> StepResult:
        """Wait until the step is computed; return its result."""


class Runner(Protocol):
    """Computes steps; see :class:`engine.runner.model_runner.ModelRunner`.

    Attributes:
        idle_waits: whoever waits for a step leaves the core to others, and wakes a little later for it. That
            is hidden where another step is enqueued.
        is_asynchronous: steps are computed while the host goes on.
    """

    idle_waits: bool
    is_asynchronous: bool

    @property
    def vocab_size(self) -> int: ...

    def execute(self, batch: ScheduledBatch, grammar_mask: GrammarMask | None = None) -> PendingStep:
        """Enqueue a step.

        Raises:
            RequestFault: the work for one request raised.
            Exception: any other reason; see :meth:`recover`.
        """

    def recover(self) -> None:
        """Get ready for the next step after one that raised; raise if no step can be computed any more."""

    def check_idle(self, released: Collection[int]) -> None:
        """Raise AssertionError unless all it holds belongs to the slots ``released`` by the next step."""

    def check_health(self) -> None:
        """Raise Unavailable if no step can be computed any more."""

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

    Attributes:
        on_step: called when a step has been enqueued.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, run_ahead: int) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._run_ahead = run_ahead
        self.on_step: Callable[[], None] = lambda: None
        # Each with the time when it was begun.
        self._in_flight: deque[tuple[ScheduledBatch, PendingStep, float]] = deque()
        self._pace = StepPace()
        self._ready: list[StepEvents] = []

    def add(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
        except Exception as error:
            request.finished = True
            self.scheduler.failed.append((request, error))

    def abort(self, request: Request) -> None:
        self.scheduler.abort(request)
        request.embeddings.clear()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight or self.scheduler.failed)

    def step(self, more: int = 0) -> list[StepEvents]:
        """Enqueue the next step, and return what finished steps gave.

        Args:
            more: steps that may stay enqueued beside the usual ones, so that the device works on while the
                caller does something else.

        Raises:
            Exception: no step can be computed any more.
        """
        idle_share = self._pace.idle_share if self.runner.is_asynchronous else 0.0
        if self.scheduler.awaits_results(idle_share):
            while self._in_flight:
                self._collect()
        begun = self._pace.begin()
        batch = self._schedule()
        if batch is not None:
            self._note_admissions(batch)
            self._execute(batch, begun)
        while len(self._in_flight) > (self._run_ahead + more if batch is not None else 0):
            self._collect()
        if self.scheduler.failed:
            self._report_failures()
        ready, self._ready = self._ready, []
        return ready

    def _schedule(self) -> ScheduledBatch | None:
        try:
            return self.scheduler.schedule()
        except Exception as error:
            logger.exception("a step could not be scheduled")
            recovery.abandon(self.scheduler, error)
            return None

    def _execute(self, batch: ScheduledBatch, begun: float) -> None:
        try:
            pending = self.runner.execute(batch, self._grammar_mask(batch))
            self._in_flight.append((batch, pending, begun))
            self.on_step()
        except Exception as error:
            self.runner.recover()
            # Earlier steps are as good as ever. Their tokens come first.
            while self._in_flight:
                self._collect()
            if isinstance(error, RequestFault):
                cause = error.__cause__
                assert isinstance(cause, Exception)
                recovery.retract(self.scheduler, batch, cause, error.request)
            else:
                logger.warning("a step is computed again", exc_info=error)
                recovery.retract(self.scheduler, batch, error, None)

    def _collect(self) -> None:
        """Wait for the oldest step in flight and take in its tokens."""
        batch, pending, begun = self._in_flight.popleft()
        try:
            result = pending.result()
        except Exception as error:
            logger.exception("the result of a step is lost")
            self.runner.recover()
            self._in_flight.clear()
            recovery.abandon(self.scheduler, error, batch)
            return
        self._pace.arrived(begun)
        for request, cause in result.failed:
            self.scheduler.fail(request, cause)
        table, constrained = self.scheduler.slots, []
        if table.num_constrained:
            constrained = table.constrained[batch.sampling_slots].nonzero()[0].tolist()
        try:
            events = self.scheduler.update(batch, result.tokens)
        except Exception as error:
            logger.exception("the result of a step could not be taken in")
            recovery.abandon(self.scheduler, error, batch)
            return
        self._ready.append(events)
        events.logprobs = result.logprobs
        events.prompt_logprobs = result.prompt_logprobs
        if constrained:
            self._advance_grammars(events, constrained)
        self._pace.taken()
        events.pooled = self.scheduler.finish_pooling(batch, dict(result.pooled))
        for ended in [*(events.requests[row] for row in events.finished), *(r for r, _ in events.pooled)]:
            assert ended is not None
            ended.embeddings.clear()

    def _advance_grammars(self, events: StepEvents, constrained: list[int]) -> None:
        """Have the grammars of the rows ``constrained`` follow their new tokens."""
        tokens = events.tokens.tolist()
        for row in constrained:
            request = events.requests[row]
            if request is not None and request.grammar is not None and row not in events.finished:
                try:
                    request.grammar.accept([tokens[row]])
                    if request.appends_forced:
                        self._append_forced(events, row, request)
                except Exception as error:
                    self.scheduler.fail(request, error)

    def _append_forced(self, events: StepEvents, row: int, request: Request) -> None:
        """Append the tokens that alone may come after the one in ``row``, and then the end if that alone may
        come. One of several tokens that may end the answer is sampled, unless any will do."""
        if room := self.scheduler.forced.room(request):
            tokens = request.grammar.force(room, request.stop_ids)
            request.grammar.forecast.sampled(int(events.tokens[row]), tokens)
            self.scheduler.append_forced(request, tokens)
            end = _only_end(request)
            if end is not None and self.scheduler.append_end(request, end):
                tokens.append(end)
                events.finished[row] = "stop"
            if tokens:
                events.forced[row] = tokens

    def _report_failures(self) -> None:
        failed, self.scheduler.failed = self.scheduler.failed, []
        for request, _ in failed:
            request.embeddings.clear()
        self._ready.append(StepEvents([], np.zeros(0, np.int64), failed=failed))

    def _grammar_mask(self, batch: ScheduledBatch) -> GrammarMask | None:
        """A callback that masks the constrained rows of ``batch``, or None if there are none.

        The runner calls it when the forward pass is already enqueued: reading the previous tokens and
        computing the masks happen while the device works.
        """
        table = self.scheduler.slots
        if not table.num_constrained or not table.constrained[batch.sampling_slots].any():
            return None

        def fill(slots: list[int], mask: np.ndarray) -> list[list[int] | None]:
            self._pace.launched()
            while self._in_flight:
                self._collect()
            settled = self.scheduler.settle_expected(batch)
            # A request that ended meanwhile has left its slot, and is constrained no more.
            constrained = table.constrained[slots]
            mask[~constrained] = -1
            index = table.computed[slots]
            is_known = constrained & (index < table.known[slots])
            if is_known.any():
                # These rows sample tokens that are forced.
                rows = np.flatnonzero(is_known)
                tokens = table.tokens[np.array(slots)[rows], index[rows]].astype(np.uint32)
                mask[rows] = 0
                mask.view(np.uint32)[rows, tokens // 32] = np.uint32(1) << tokens % 32
            open_rows = np.flatnonzero(constrained & ~is_known)
            requests = table.requests[np.array(slots)[open_rows]].tolist()
            self._fill_masks(list(zip(requests, open_rows.tolist(), strict=True)), mask)
            return settled

        return fill

    def _fill_masks(self, requests: list[tuple[Request, int]], mask: np.ndarray) -> None:
        """Write the masks of constrained requests into their rows of ``mask``; those that raise end."""
        try:
            if requests:
                GrammarMatcher.fill_masks([(request.grammar, row) for request, row in requests], mask)
        except Exception:
            for request, row in requests:
                try:
                    request.grammar.fill_mask(mask[row])
                except Exception as error:
                    # Its token comes to nothing.
                    mask[row] = -1
                    self.scheduler.fail(request, error)
        if any(request.appends_forced for request, _ in requests):
            sums = mask[:, :_FIRST_WORDS].sum(axis=1, dtype=np.int32).tolist()
            for request, row in requests:
                request.grammar.forecast.sampling(sums[row])

    def _note_admissions(self, batch: ScheduledBatch) -> None:
        now = time.monotonic()
        for admission in batch.admitted:
            if admission.request.admitted_at is None:
                admission.request.admitted_at = now

    def check_integrity(self) -> None:
        """At idle: nothing is held anywhere. Raises AssertionError."""
        assert not self._in_flight, "steps are still in flight"
        self.scheduler.check_integrity()
        self.runner.check_idle(self.scheduler.released)


def _only_end(request: Request) -> int | None:
    """The token that ends the answer, if its grammar allows no other that the caller could tell from it."""
    ends, params = request.grammar.ends, request.params
    # The answer tells which of the caller's own stop tokens has ended it.
    if len(ends) > 1 and not (params.any_end and ends.isdisjoint(params.stop_token_ids)):
        return None
    return min(ends, default=None)
