"""Tokens of an answer that its grammar alone decides: known before a step samples them.

They are appended to the answer at once, and computed together as a chunk, like those of a prompt. A step that
is in flight by then, or one that computes them singly, samples what is known already; its token is dropped.

Where it is likely which tokens will be forced behind one in flight, whatever it is or since it is one of few,
they are computed in the same step as that token. The device chooses them, as it has the token first. Before
the step samples, the host has the token, too, and what it forces: if these are other tokens, the chunk counts
for nothing, and the token is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.request import Request
from engine.scheduling.batch import PrefillChunk, TableUpdate
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.slots import SequenceSlots
from engine.structured.run_odds import ANY

#: A step with chunks takes longer than one that only decodes. It pays if it saves a row for every so many
#: that decode.
_ROWS_PER_SAVED = 4
#: Tokens that are only expected don't make a step longer than a multiple of so many: a pass of 7B over 272
#: tokens takes half as long again as one over 256.
_TILE = 256
#: Most decoding requests for which steps wait. The host needs milliseconds for many, and to wait for it costs
#: more than the steps that are saved.
_FEW = 8


def cover(table: SequenceSlots, kv: KVManager, slot: int, end: int, updates: list[TableUpdate]) -> bool:
    """Give a slot the blocks for its tokens up to ``end``, and add them to ``updates``; False if too few are
    free."""
    request = table.requests[slot]
    while table.capacity[slot] < end:
        updates += kv.leave_behind(request, int(table.computed[slot]))
        if not (grown := kv.grow(request)):
            return False
        updates += grown
        table.capacity[slot] = len(request.blocks[0]) * kv.block_size
    return True


class ForcedTokens:
    """The forced tokens of running requests that are not computed yet.

    Args:
        slots: the scheduler's counters.
        kv: the scheduler's KV blocks.
        expects: compute tokens before it is certain that they are forced. Recurrent states could not go back
            behind them.
    """

    def __init__(self, slots: SequenceSlots, kv: KVManager, *, expects: bool) -> None:
        self._slots, self._kv, self._expects = slots, kv, expects
        #: Slots that may have several known tokens to compute.
        self._behind: set[int] = set()
        #: Enqueued rows of a slot, its oldest ones, that sample a token which is known.
        self._redundant: dict[int, int] = {}
        #: Slots whose requests may get forced tokens, since their first sampled one.
        self._answering: set[int] = set()

    def room(self, request: Request) -> int:
        """Return how many tokens may be forced: the last token before a limit is left to be sampled."""
        if request.slot is None:
            return 0
        table, slot = self._slots, request.slot
        end = min(table.limit.item(slot), table.pause.item(slot))
        return max(0, end - 1 - table.known.item(slot))

    def append(self, request: Request, tokens: Sequence[int]) -> None:
        """Make ``tokens``, at most :meth:`room`, the next known ones of a running request."""
        table, slot = self._slots, request.slot
        assert slot is not None
        self._answering.add(slot)
        if not tokens:
            return
        known = table.known.item(slot)
        table.tokens[slot, known : known + len(tokens)] = tokens
        table.known[slot] = known + len(tokens)
        self._behind.add(slot)
        if in_flight := table.computed.item(slot) - known + 1:
            self._redundant[slot] = in_flight

    def leave(self, slot: int) -> None:
        """Forget a slot whose request leaves it."""
        self._behind.discard(slot)
        self._redundant.pop(slot, None)
        self._answering.discard(slot)

    def are_worth_waiting_for(self, idle_share: float) -> bool:
        """Return True if the next step is better scheduled when the tokens of the last one are known: a
        request that gets forced tokens then needs a step fewer.

        Args:
            idle_share: the part of a step for which the device would be idle.
        """
        decoding = len(self._slots.decode_slots())
        if not self._answering or decoding > _FEW:
            return False
        requests = [self._slots.requests[slot] for slot in self._answering]
        expected = sum(request.grammar.forecast.odds for request in requests if request is not None)
        return expected > idle_share * decoding

    def chunks(
        self, decode_slots: np.ndarray, budget: int, updates: list[TableUpdate], *, mixed: bool
    ) -> list[PrefillChunk]:
        """Return the chunks of this step, whose slots then don't decode; add the blocks that they need to
        ``updates``.

        Args:
            decode_slots: decoding rows, each of which has a block for one token.
            budget: tokens that the step can compute beside them.
            mixed: the step computes prompts as well.
        """
        if not (self._behind or self._answering):
            return []
        chunks = self._certain_chunks(decode_slots, budget, updates, mixed=mixed)
        rows = len(decode_slots) + sum(chunk.count - 1 for chunk in chunks)
        room = min(budget + len(decode_slots) - rows, -rows % _TILE)
        return self._expected_chunks(decode_slots, room, updates) + chunks

    def _certain_chunks(
        self, decode_slots: np.ndarray, budget: int, updates: list[TableUpdate], *, mixed: bool
    ) -> list[PrefillChunk]:
        if not self._behind:
            return []
        table = self._slots
        decoding = set(decode_slots.tolist())
        counts = {slot: int(table.known[slot] - table.computed[slot]) for slot in sorted(self._behind)}
        self._behind = {slot for slot, count in counts.items() if count > 1}
        chosen = {slot: counts[slot] for slot in sorted(self._behind & decoding)}
        saved = sum(count - 1 for count in chosen.values())
        if not mixed and saved * _ROWS_PER_SAVED < len(decode_slots):
            chosen = {}
        chunks = []
        for slot, count in chosen.items():
            start, end = int(table.computed[slot]), int(table.known[slot])
            if count - 1 <= budget and cover(table, self._kv, slot, end, updates):
                tokens = table.tokens[slot, start:end].tolist()
                chunks.append(PrefillChunk(table.requests[slot], slot, start, count, True, answer=tokens))
                budget -= count - 1
        for slot in (self._behind & decoding).difference(chunk.slot for chunk in chunks):
            self._redundant[slot] = self._redundant.get(slot, 0) + 1
        return chunks

    def _expected_chunks(
        self, decode_slots: np.ndarray, budget: int, updates: list[TableUpdate]
    ) -> list[PrefillChunk]:
        """Up to ``budget`` tokens that are expected to be forced behind those in flight."""
        chunks: list[PrefillChunk] = []
        if not self._expects or len(decode_slots) <= _FEW:
            return chunks
        table = self._slots
        for slot in sorted(self._answering & set(decode_slots.tolist())):
            request, start = table.requests[slot], table.computed.item(slot)
            runs = request.grammar.forecast.expected
            if not runs or start != table.known.item(slot):
                continue
            # As for :meth:`room`, when the token in flight is known.
            end = min(table.limit.item(slot), table.pause.item(slot)) - 1
            count = 1 + max(map(len, runs.values()))
            if start + count > end or count - 1 > budget:
                continue
            if cover(table, self._kv, slot, start + count, updates):
                zeros = [0] * count
                chunks.append(
                    PrefillChunk(request, slot, start, count, True, answer=zeros, expected=dict(runs))
                )
                budget -= count - 1
        return chunks

    def settle(self, chunk: PrefillChunk) -> list[int] | None:
        """The first token of an expected chunk is known, and what it forces.

        Returns:
            The tokens behind the first one that the chunk computes, none or all that are forced; None if it
            computes others.
        """
        table, slot = self._slots, chunk.slot
        assert chunk.expected is not None
        first, *forced = table.tokens[slot, chunk.start : table.known.item(slot)].tolist()
        run = list(chunk.expected.get(first, chunk.expected.get(ANY, ())))
        if not run:
            # As if it had only been decoded.
            return run
        # Nothing else of this slot is in flight.
        self._redundant.pop(slot, None)
        if forced != run:
            table.computed[slot] = chunk.start
            return None
        table.computed[slot] = chunk.start + 1 + len(run)
        self._behind.discard(slot)
        return run

    def without_redundant(
        self, slots: np.ndarray, requests: list[Request | None]
    ) -> tuple[list[Request | None], bool]:
        """Return ``requests`` of a finished step's rows with None in place of those whose sampled tokens were
        known, and whether there are such."""
        rows = [row for row, slot in enumerate(slots.tolist()) if slot in self._redundant and requests[row]]
        for row in rows:
            slot = int(slots[row])
            self._redundant[slot] -= 1
            if not self._redundant[slot]:
                del self._redundant[slot]
        if not rows:
            return requests, False
        dropped = set(rows)
        return [None if row in dropped else request for row, request in enumerate(requests)], True

    @property
    def any_redundant(self) -> bool:
        """True if some enqueued row samples a token that is known."""
        return bool(self._redundant)

    def check_idle(self) -> None:
        """Raise AssertionError unless nothing is kept of any slot."""
        assert not (self._behind or self._redundant or self._answering), "forced tokens are left over"
