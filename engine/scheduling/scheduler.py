"""Decides what every step computes.

A step has a budget of tokens, spent on tokens that are known but not computed: first one token of every
decoding request, so that long prompts don't delay running answers, then prompt chunks in order of arrival,
then requests that wait, late ones last (:mod:`engine.goal_queue`). Prefix hits, chunked prefill and the
recomputation of preempted requests follow from the same two counters.

No exception of one request's work leaves the scheduler: the request ends and is listed in
:attr:`Scheduler.failed`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.metrics import COUNT_BUCKETS, Histogram
from engine.request import Request
from engine.scheduling.batch import Admission, PrefillChunk, ScheduledBatch, StepEvents, TableUpdate
from engine.scheduling.drafts import Drafts
from engine.scheduling.encoder_ledger import EncoderLedger, rows_from
from engine.scheduling.forced import ForcedTokens
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.sampled import SampledTokens
from engine.scheduling.slots import SequenceSlots
from engine.scheduling.waiting import WaitingQueue

logger = logging.getLogger(__name__)

#: Prompts are spread over about this many steps, each filled up to a multiple of ``_SHORT_STEP`` tokens: so
#: many take a GPU little more time than reading the weights does.
_SPREAD = 4
_SHORT_STEP = 256
#: Known tokens of the requests that enter in one step, but for the last one's. Of cached ones little is
#: computed, but the host takes some tens of milliseconds to look up so many, and running answers wait for it.
_MOST_ENTERING = 1 << 17


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start. ``batches`` counts steps by the number of requests that they computed."""

    preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    batches: Histogram = field(default_factory=lambda: Histogram(COUNT_BUCKETS))


class Scheduler:
    """Continuous batching over slots.

    Args:
        kv: KV blocks.
        ledger: embedding rows.
        max_num_seqs: most requests running at once. Limited to less than the token budget, so that prompts
            progress however many requests decode.
        max_num_batched_tokens: most tokens computed in one step.
        max_model_len: longest sequence in tokens; limited by the number of KV blocks.
        recompute_beyond: see :class:`~engine.layers.decoder_config.RopeConfig`.
        most_drafted: most tokens of a draft; 0 for no drafts.
        has_states: the model has recurrent states.

    Attributes:
        spreads_prompts: prompts are spread over several steps while answers run. These keep their pace, and
            all are done a little later.
    """

    def __init__(
        self,
        kv: KVManager,
        ledger: EncoderLedger,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        recompute_beyond: int | None = None,
        most_drafted: int = 0,
        has_states: bool = False,
    ) -> None:
        self.kv = kv
        self.ledger = ledger
        self.budget = max_num_batched_tokens
        self.max_model_len = min(max_model_len, kv.longest)
        self.slots = SequenceSlots(max(1, min(max_num_seqs, max_num_batched_tokens - 1)), self.max_model_len)
        self.forced = ForcedTokens(self.slots, kv, expects=not has_states)
        self.spreads_prompts = False
        self.drafts = Drafts(self.slots, kv, most_drafted)
        self.recompute_beyond = recompute_beyond
        self._sampled = SampledTokens(
            self.slots, self.drafts, self._finish, self._recompute_longer if recompute_beyond else None
        )
        self.stats = SchedulerStats()
        #: Requests that an exception ended, until :class:`~engine.core.EngineCore` reports them.
        self.failed: list[tuple[Request, Exception]] = []
        self._waiting = WaitingQueue()
        self._prefilling: list[Request] = []
        #: Slots given up since the last step.
        self.released: list[int] = []
        self._step = itertools.count()

    # Arrival and end of requests.

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            ContextLengthExceeded: the prompt leaves no room for a token.
            InvalidRequest: its images need more embedding rows than the ledger's budget, or a range that
                attends both ways is longer than a step.
        """
        room = 0 if request.pooling else 1
        if request.num_prompt + room > self.max_model_len:
            raise ContextLengthExceeded.by(self.max_model_len, request.num_prompt, room)
        rows = rows_from(request, 0)
        if rows > self.ledger.budget:
            raise InvalidRequest(
                f"The request's images need {rows} visual tokens, but max_encoder_tokens is "
                f"{self.ledger.budget}. Send fewer or smaller images.",
                param="prompt",
            )
        longest = max((end - start for start, end in request.both_ways), default=0)
        if longest > self.budget:
            raise InvalidRequest(
                f"{longest} tokens of the prompt attend to each other and must be computed in one step, but "
                f"max_num_batched_tokens is {self.budget}. Raise it, or send fewer or smaller images.",
                param="prompt",
            )

    def add(self, request: Request) -> None:
        """Queue a request that passed :meth:`check`."""
        self._enqueue(request)
        self.stats.prompt_tokens += request.num_prompt

    def abort(self, request: Request) -> None:
        """End a request, waiting or running, and free all it holds. Does nothing if it has ended."""
        if not request.finished:
            self._end(request)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request as :meth:`abort` does, because ``error`` was raised by its work.

        Its blocks are not published, because their content may be wrong.
        """
        if not request.finished:
            self._end(request, publish=False)
            self.failed.append((request, error))

    def take_back(self, batch: ScheduledBatch) -> None:
        """Undo the counts of the latest step, which was not computed; release its released slots again.

        Its requests are unchanged; see :mod:`engine.scheduling.recovery`.
        """
        self.released = batch.released + self.released
        self.stats.computed_tokens -= batch.num_tokens
        for admission in batch.admitted:
            if admission.request.num_preemptions == 0:
                # It was admitted for the first time.
                self.stats.cached_tokens -= admission.request.num_cached or 0
                admission.request.num_cached = None

    @property
    def running(self) -> list[Request]:
        """All requests that have a slot."""
        return [request for request in self.slots.requests if request is not None]

    @property
    def waiting(self) -> list[Request]:
        """All requests that wait for one."""
        return self._waiting.requests()

    @property
    def num_running(self) -> int:
        return len(self.slots.requests) - self.slots.num_free

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_late(self) -> int:
        """Requests that have become late while they waited, since the start."""
        return self._waiting.num_late

    @property
    def waiting_tokens(self) -> int:
        """Known tokens of the requests that wait."""
        return self._waiting.tokens

    def uncached_tokens(self, request: Request) -> int:
        """Return how many tokens of a waiting request no block of the prefix cache holds."""
        if request.finished:
            return 0
        return len(request.token_ids) - len(self.kv.cached_prefix(request)[0]) * self.kv.block_size

    @property
    def has_work(self) -> bool:
        return len(self._waiting) > 0 or self.num_running > 0

    @property
    def _has_prompts(self) -> bool:
        return bool(self._prefilling) or len(self._waiting) > 0

    # Steps.

    def awaits_results(self, idle_share: float) -> bool:
        """Return True if the next step is better scheduled when no step is in flight.

        Args:
            idle_share: the part of a step for which the device would be idle.
        """
        return self.forced.are_worth_waiting_for(idle_share) or self.drafts.are_imminent(self._has_prompts)

    def schedule(self) -> ScheduledBatch | None:
        """Schedule the next step; return None if nothing can be computed until results arrive."""
        if self.kv.pool.snapshots is not None:
            self.kv.pool.snapshots.begin_step()
        updates = self._grow_decodes()
        decode_slots = self.slots.decode_slots()
        if self._is_held_up(self.budget - len(decode_slots)):
            decode_slots = decode_slots[:0]
        left = self.budget - len(decode_slots)
        mixed = self._has_prompts
        chunks = self.forced.chunks(decode_slots, left, updates, mixed=mixed)
        if not (chunks or mixed):
            chunks = self.drafts.chunks(decode_slots, left, updates)
        if chunks:
            alone = self.slots.decoding.copy()
            alone[[chunk.slot for chunk in chunks]] = False
            decode_slots = np.flatnonzero(alone)
        batch = ScheduledBatch(next(self._step), decode_slots, chunks, table_updates=updates)
        self.slots.computed[decode_slots] += 1
        for chunk in chunks:
            # Of an expected chunk the first token is certain.
            self.slots.computed[chunk.slot] += 1 if chunk.expected is not None else chunk.count
        left = self.budget - batch.num_tokens
        if mixed and self.spreads_prompts:
            left = min(left, self._room_beside(batch.num_tokens))
        for request in list(self._prefilling):
            try:
                left -= self._prefill(request, left, batch)
            except Exception as error:
                self._drop(request, error, batch)
        self._admit_waiting(left, batch)
        if not batch.num_tokens:
            return self._unblock()
        rows = batch.sampling_slots
        batch.epochs = self.slots.epochs_of(rows)
        self.stats.computed_tokens += batch.num_tokens
        self.stats.batches.observe(len(decode_slots) + len(batch.prefills))
        self._retire_full_rows(rows)
        batch.released, self.released = self.released, []
        return batch

    def update(self, batch: ScheduledBatch, tokens: np.ndarray) -> StepEvents:
        """Store the tokens that a step sampled, and end the requests that they complete.

        Args:
            batch: the step.
            tokens: int64 ``(R,)``, one per row of ``batch.sampling_slots``. A request whose token is -1 ends:
                no token was allowed.
        """
        table, slots = self.slots, batch.sampling_slots
        assert batch.epochs is not None
        requests, all_live = table.live_requests(slots, batch.epochs)
        if self.forced.any_redundant:
            requests, found = self.forced.without_redundant(slots, requests)
            all_live = all_live and not found
        events = StepEvents(requests, tokens)
        rows = None if all_live else np.flatnonzero([request is not None for request in requests])
        self.stats.output_tokens += self._sampled.store(batch, events, rows)
        # Only a chunk gives a request's first token.
        for row in range(len(batch.decode_slots), len(slots)):
            if (request := events.requests[row]) is not None and request.opening:
                events.opening[row], request.opening = request.opening, []
                self.stats.output_tokens += len(events.opening[row])
        return events

    def append_forced(self, request: Request, tokens: Sequence[int]) -> None:
        """Add the tokens that the grammar of ``request`` forces behind its last known one, see
        :class:`ForcedTokens`. An empty sequence is passed, too: it says that nothing is forced."""
        self.forced.append(request, tokens)
        self.stats.output_tokens += len(tokens)

    def settle_expected(self, batch: ScheduledBatch) -> list[list[int] | None]:
        """All tokens before those that ``batch`` samples are known: settle its expected chunks, see
        :meth:`.ForcedTokens.settle`."""
        settled: list[list[int] | None] = []
        # Expected chunks are the first ones.
        expected = itertools.takewhile(lambda chunk: chunk.expected is not None, batch.prefills)
        for row, chunk in enumerate(expected, start=len(batch.decode_slots)):
            assert batch.epochs is not None
            if self.slots.epoch[chunk.slot] != batch.epochs[row]:
                # What is computed for a request that has ended is ignored.
                settled.append([])
                continue
            run = self.forced.settle(chunk)
            if run is None:
                # As if another request had the slot: what the row samples is ignored.
                batch.epochs[row] = -1
            else:
                self._retire_full_rows(np.array([chunk.slot]))
            settled.append(run)
        return settled

    def append_end(self, request: Request, token: int) -> bool:
        """End ``request`` with ``token``; neither it nor those before it are computed. Return False if it may
        not end so, or if that raised an exception."""
        if request.slot is None or token not in request.stop_ids:
            return False
        table, slot = self.slots, request.slot
        known = int(table.known[slot])
        if known + 1 < table.min_total[slot] or known >= min(table.limit[slot], table.pause[slot]):
            return False
        table.tokens[slot, known] = token
        table.known[slot] = known + 1
        self.stats.output_tokens += 1
        return self._finish(request)

    def finish_pooling(
        self, batch: ScheduledBatch, vectors: dict[Request, np.ndarray]
    ) -> list[tuple[Request, np.ndarray]]:
        """End the pooling requests whose prompts this step completed; return them with their vectors."""
        done = [c.request for c in batch.prefills if c.completes and c.request.pooling is not None]
        # A request preempted or aborted meanwhile has no slot; a preempted one will be recomputed.
        done = [request for request in done if request.slot is not None and self._finish(request)]
        return [(request, vectors[request]) for request in done]

    # Parts of a step.

    def _grow_decodes(self) -> list[TableUpdate]:
        """Give a block to every decoding row that needs one; if none is free, preempt the request that
        :meth:`_victim` names."""
        table = self.slots
        updates: list[TableUpdate] = []
        slots = table.decode_slots()
        needy = slots[table.computed[slots] >= table.capacity[slots]]
        for slot in needy.tolist():
            request = table.requests[slot]
            while request is not None and request.slot == slot:
                updates += self.kv.leave_behind(request, int(table.computed[slot]))
                if grown := self.kv.grow(request):
                    updates += grown
                    table.capacity[slot] = len(request.blocks[0]) * self.kv.block_size
                    break
                self.preempt(self._victim())
        # A request can grow and be preempted in the same step: its table updates must not reach the runner.
        return [u for u in updates if table.requests[u.slot] is not None]

    def _room_beside(self, tokens: int) -> int:
        """Return how many tokens of prompts come into a step with ``tokens`` of running answers."""
        table, begun = self.slots, self._prefilling
        # What attends both ways can't be cut.
        if not tokens or any(request.both_ways for request in begun):
            return self.budget
        left = self._waiting.tokens + sum(int(table.known[r.slot] - table.computed[r.slot]) for r in begun)
        least = max(_SHORT_STEP // 2, left // _SPREAD)
        return -(-(tokens + least) // _SHORT_STEP) * _SHORT_STEP - tokens

    def _unblock(self) -> ScheduledBatch | None:
        """Schedule the next step if none of the prompts that are being computed has a block to go on with:
        preempt one of them. None while other requests are about to end, or if nothing can be computed."""
        if not self._prefilling or len(self._prefilling) < self.num_running:
            return None
        self.preempt(self._victim())
        return self.schedule()

    def _is_held_up(self, budget: int) -> bool:
        """Return True if ``budget`` tokens are too few for the next ones of the first prompt, which attend
        both ways. Running answers wait for a step then, or they could keep the prompt waiting forever."""
        if not self._prefilling or not self._prefilling[0].both_ways:
            return False
        request = self._prefilling[0]
        start = int(self.slots.computed[request.slot])
        return self._reach(request, budget) <= start < self._reach(request, self.budget)

    def _reach(self, request: Request, budget: int) -> int:
        """Return where the next chunk of a prompt can end, of up to ``budget`` tokens."""
        table, slot = self.slots, request.slot
        start = int(table.computed[slot])
        return request.uncut(self.kv.reach(request, start, min(int(table.known[slot]), start + budget)))

    def _prefill(self, request: Request, budget: int, batch: ScheduledBatch) -> int:
        """Schedule as much of a prompt as fits; return the number of tokens."""
        table, slot = self.slots, request.slot
        assert slot is not None
        start = int(table.computed[slot])
        end = self.kv.chunk_end(request, start, self._reach(request, budget))
        count = end - start
        if count <= 0:
            return 0
        batch.table_updates += self.kv.leave_behind(request, start) + self.kv.cover(request, end)
        completes = end == table.known[slot]
        table.computed[slot] = end
        chunk = PrefillChunk(request, slot, start, count, completes)
        batch.prefills.append(chunk)
        self.ledger.hold(request, end)
        self.kv.publish(request, request.ids, end)
        chunk.snapshot = self.kv.keep_state(request, start, end)
        if completes:
            self._prefilling.remove(request)
            table.set_decoding(slot, request.pooling is None)
        return count

    def _admit_waiting(self, budget: int, batch: ScheduledBatch) -> None:
        """Admit waiting requests while there are tokens, slots and blocks."""
        entering = 0
        while budget > 0 and entering < _MOST_ENTERING and self.slots.num_free:
            if (request := self._waiting.first()) is None:
                break
            prompts = [chunk.request for chunk in batch.prefills if chunk.answer is None]
            if prompts and (request.suspect or prompts[-1].suspect):
                break
            try:
                if not self._admit(request, batch):
                    break
                entering += len(request.token_ids)
                count = self._prefill(request, budget, batch)
                if not count:
                    break
                budget -= count
            except Exception as error:
                self._drop(request, error, batch)

    def _admit(self, request: Request, batch: ScheduledBatch) -> bool:
        """Give the first waiting request a slot and blocks; False if there are too few."""
        cached = self.kv.cached_prefix(request)
        num_cached = len(cached[0])
        if self.kv.awaits_snapshot(request, num_cached):
            return False
        computed = num_cached * self.kv.block_size
        # A request that runs alone may take every block. Others leave some blocks for those that grow.
        reserve = self.kv.pool.capacity // 100 + len(cached) if self.num_running else 0
        if not self.kv.admit(request, cached, reserve):
            return False
        self._waiting.pop()
        capacity = self.kv.blocks_for(len(request.token_ids)) * self.kv.block_size
        slot = self.slots.enter(request, computed, capacity)
        if self.recompute_beyond is not None and request.rope_variant == 0:
            self.slots.pause[slot] = min(self.slots.limit[slot], self.recompute_beyond + 1)
        self.ledger.hold(request, computed)
        if request.num_cached is None:
            # Blocks of its answer may be cached as well.
            request.num_cached = min(computed, request.num_prompt)
            self.stats.cached_tokens += request.num_cached
        batch.admitted.append(Admission(request, slot, computed, self.kv.snapshot_at(request, num_cached)))
        self._prefilling.append(request)
        return True

    def _drop(self, request: Request, error: Exception, batch: ScheduledBatch) -> None:
        """End a request whose scheduling raised ``error``, and take it out of the step."""
        for chunk in batch.prefills:
            if chunk.request is request:
                self.kv.withdraw(request, chunk.start)
        batch.prefills = [chunk for chunk in batch.prefills if chunk.request is not request]
        batch.table_updates = [update for update in batch.table_updates if update.slot != request.slot]
        batch.admitted = [admission for admission in batch.admitted if admission.request is not request]
        self.fail(request, error)

    def _retire_full_rows(self, rows: np.ndarray) -> None:
        """Stop decoding in rows that have reached their pause except for a token in flight.

        When that token arrives, the request ends or is computed again.
        """
        table = self.slots
        for slot in rows[table.computed[rows] + 1 >= table.pause[rows]].tolist():
            table.set_decoding(slot, False)

    # Ends and interruptions.

    def _victim(self) -> Request:
        """Return the running request to preempt: lowest priority (largest number), then latest arrival."""
        return max(self.running, key=lambda request: (request.priority, request.arrival))

    def preempt(self, request: Request, *, publish: bool = True) -> None:
        """Take a running request's slot and blocks, and queue it to be computed again.

        Args:
            publish: True if its blocks stay findable; False if their content may not match their hashes.
        """
        self.stats.preempted += 1
        self._interrupt(request, publish=publish)
        self._enqueue(request)

    def _recompute_longer(self, slot: int) -> None:
        """Compute a request again from its start, with the rotary frequencies of longer sequences."""
        request = self.slots.requests[slot]
        assert request is not None and request.rope_variant == 0
        self._interrupt(request)
        request.rope_variant, request.block_hashes = 1, []
        self._enqueue(request)

    def _interrupt(self, request: Request, *, publish: bool = True) -> None:
        """Take a running request's slot and blocks; all its known tokens are to be computed again."""
        assert request.slot is not None
        request.token_ids = self.slots.known_tokens(request.slot)
        request.num_preemptions += 1
        self._release(request, publish=publish)

    def _finish(self, request: Request) -> bool:
        """End a request that is complete; return False if that raised an exception."""
        request.finished = True
        try:
            self._release(request)
        except Exception as error:
            self.failed.append((request, error))
            return False
        self.stats.finished += 1
        return True

    def _end(self, request: Request, *, publish: bool = True) -> None:
        """End a request that waits or runs, before it is complete."""
        request.finished = True
        if request.slot is None:
            self._forget_waiting(request)
        else:
            self._release(request, publish=publish)

    def _release(self, request: Request, *, publish: bool = True) -> None:
        table, slot = self.slots, request.slot
        assert slot is not None
        if request in self._prefilling:
            self._prefilling.remove(request)
        if publish:
            self._publish_answer(request, slot)
        self.released.append(slot)
        table.leave(slot)
        self.forced.leave(slot)
        self.drafts.leave(slot)
        self.kv.free(request)
        self.ledger.release(request)

    def _publish_answer(self, request: Request, slot: int) -> None:
        """Make a request's blocks findable, those of its answer included.

        Those are published only now, because hardly any request needs them before the answer ends.
        """
        table = self.slots
        # The last known token isn't computed.
        computed = min(int(table.known[slot]) - 1, int(table.computed[slot]))
        try:
            self.kv.publish(request, table.tokens[slot], computed)
        except Exception:
            # The answer is right all the same, and the request's slot and blocks must be freed.
            logger.exception("request %s is left out of the prefix cache", request.id)

    def _forget_waiting(self, request: Request) -> None:
        self._waiting.forget(request)
        self.ledger.release(request)

    def _enqueue(self, request: Request) -> None:
        self._waiting.push(request)
        self.ledger.hold(request, 0)

    def check_integrity(self) -> None:
        """Raise AssertionError unless, at idle, every block, slot and embedding row is free."""
        assert not self.has_work and not self._prefilling, "requests are still there"
        assert not self.waiting_tokens, "waiting tokens are miscounted"
        assert self.kv.pool.num_free == self.kv.pool.capacity, "KV blocks are lost"
        self.kv.pool.check_integrity()
        self.ledger.check_idle()
        self.slots.check_idle()
        self.forced.check_idle()
        self.drafts.check_idle()
