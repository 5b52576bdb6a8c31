"""Stores the tokens that steps sampled, and ends the requests that they complete."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.request import Request
from engine.scheduling.batch import PrefillChunk, ScheduledBatch, StepEvents
from engine.scheduling.drafts import Drafts
from engine.scheduling.slots import SequenceSlots


class SampledTokens:
    """Stores the sampled tokens of a scheduler's requests.

    Args:
        slots: the scheduler's counters.
        drafts: the scheduler's drafts.
        finish: ends a complete request; returns False if that raised an exception.
        recompute_longer: computes the request of a slot that has reached its pause again, with the rotary
            frequencies of longer sequences; None if the model has one set of them.
    """

    def __init__(
        self,
        slots: SequenceSlots,
        drafts: Drafts,
        finish: Callable[[Request], bool],
        recompute_longer: Callable[[int], None] | None,
    ) -> None:
        self._slots, self._drafts = slots, drafts
        self._finish, self._recompute_longer = finish, recompute_longer

    def store(self, batch: ScheduledBatch, events: StepEvents, rows: np.ndarray | None) -> int:
        """Store the tokens of a step, and those of its drafts as far as they hold; return their number.

        Args:
            batch: the step.
            events: its tokens, one per row of ``batch.sampling_slots``, and their requests. What happens to
                the requests is added. Requests of guesses that don't hold become None.
            rows: indices of the rows whose requests still run; None for all rows.
        """
        slots = batch.sampling_slots
        if any(chunk.num_drafted for chunk in batch.prefills):
            return self._take_drafts(batch, events, np.arange(len(slots)) if rows is None else rows)
        return self._take(events, slots, rows)

    def _take(self, events: StepEvents, slots: np.ndarray, rows: np.ndarray | None) -> int:
        """Store the tokens of ``rows``, each of another request; None for all rows."""
        table, requests, tokens_live = self._slots, events.requests, events.tokens
        if rows is not None:
            slots, tokens_live = slots[rows], tokens_live[rows]
        if (tokens_live < 0).any():
            rows = np.arange(len(slots)) if rows is None else rows
            self._end_without_token(events, rows[tokens_live < 0])
            live = tokens_live >= 0
            rows, slots, tokens_live = rows[live], slots[live], tokens_live[live]
        known = table.known[slots]
        table.tokens[slots, known] = tokens_live
        known += 1
        table.known[slots] = known
        ended = known >= table.limit[slots]
        stopped = table.stop_ids[slots] == tokens_live[:, None]
        stops = stopped.any(axis=1) & (known >= table.min_total[slots]) if stopped.any() else None
        if stops is not None:
            ended |= stops
        paused = slots[(known >= table.pause[slots]) & ~ended] if self._recompute_longer else slots[:0]
        for index in ended.nonzero()[0].tolist():
            row = index if rows is None else int(rows[index])
            request = requests[row]
            assert request is not None
            if self._finish(request):
                events.finished[row] = "stop" if stops is not None and stops[index] else "length"
        for slot in paused.tolist():
            assert self._recompute_longer is not None
            self._recompute_longer(slot)
        return len(slots)

    def _take_drafts(self, batch: ScheduledBatch, events: StepEvents, rows: np.ndarray) -> int:
        """Store the tokens of ``rows``, and of drafts as far as they hold."""
        slots, first = batch.sampling_slots, len(batch.decode_slots)
        events.requests = list(events.requests)
        drafts = []
        for chunk in batch.prefills:
            if chunk.num_drafted:
                drafts.append((chunk, first))
            first += chunk.sampling_rows
        later = [row for chunk, first in drafts for row in range(first + 1, first + chunk.sampling_rows)]
        count = self._take(events, slots, np.setdiff1d(rows, later))
        return count + sum(self._take_draft(events, slots, chunk, first) for chunk, first in drafts)

    def _take_draft(self, events: StepEvents, slots: np.ndarray, chunk: PrefillChunk, first: int) -> int:
        """Store the tokens of one draft as far as they hold, behind the stored token of row ``first``."""
        table, request, held, count = self._slots, events.requests[first], 0, 0
        for guess in chunk.token_ids[-chunk.num_drafted :]:
            if request is None or request.slot != chunk.slot or events.tokens[first + held] != guess:
                break
            held += 1
            count += self._take(events, slots, np.array([first + held]))
        for row in range(first + held + 1, first + chunk.sampling_rows):
            events.requests[row] = None
        if request is not None and request.slot == chunk.slot:
            # What was computed for guesses that don't hold will be overwritten.
            table.computed[chunk.slot] = table.known[chunk.slot] - 1
            self._drafts.settle(chunk, held)
        return count

    def _end_without_token(self, events: StepEvents, rows: np.ndarray) -> None:
        for row in rows.tolist():
            request = events.requests[row]
            assert request is not None
            if self._finish(request):
                events.finished[row] = "error"
