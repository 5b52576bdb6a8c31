"""Guesses of an answer's next tokens, looked up in its prompt and in itself, and verified in one step.

A step computes the last known token and a draft of those that may follow, and samples after each of them. As
long as the sampled tokens are those of the draft they hold, and so does the one after them. What is sampled
depends on the seed and the position alone, so that the answer is the one without drafts.
"""

from __future__ import annotations

import numpy as np

from engine.scheduling.batch import PrefillChunk, TableUpdate
from engine.scheduling.forced import cover
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.slots import SequenceSlots

#: Tokens in a row that must have come before, for what followed them to be a draft.
_MATCHED = 3
#: Most decoding requests of a step that verifies drafts. With more of them, one token each uses the device
#: well enough.
_MOST_REQUESTS = 4
#: Most tokens for which a request gets no draft after drafts of which nothing held.
_LONGEST_PAUSE = 32


class _History:
    """Remembers where each sequence of :data:`_MATCHED` tokens came last in one request's tokens."""

    def __init__(self) -> None:
        self._ends: dict[bytes, int] = {}
        self._indexed = _MATCHED
        self.failures = 0
        #: Known tokens from which on there are drafts again.
        self.resumes_at = 0

    def draft(self, tokens: np.ndarray, most: int) -> list[int]:
        """Return up to ``most`` tokens that followed the last tokens of int32 ``tokens`` when those came
        before; none if they are new."""
        known = len(tokens)
        size = _MATCHED * tokens.itemsize
        # The last sequence is left out: it would be found itself.
        data, first = tokens[self._indexed - _MATCHED : known].tobytes(), self._indexed
        for end in range(first, known):
            start = (end - first) * tokens.itemsize
            self._ends[data[start : start + size]] = end
        self._indexed = max(self._indexed, known)
        found = self._ends.get(data[-size:]) if known >= _MATCHED else None
        if found is None:
            return []
        # Beyond the known tokens the draft itself goes on repeating them.
        return tokens[found + np.arange(most) % (known - found)].tolist()


class Drafts:
    """Drafts for the running requests of a scheduler.

    Args:
        slots: the scheduler's counters.
        kv: the scheduler's KV blocks.
        most: tokens of a draft; 0 for no drafts.
    """

    def __init__(self, slots: SequenceSlots, kv: KVManager, most: int) -> None:
        self._slots, self._kv, self._most = slots, kv, most
        self._histories: dict[int, _History] = {}
        #: Slots whose drafts are in flight.
        self._open: set[int] = set()
        self.drafted = 0
        self.accepted = 0

    def are_imminent(self, others_wait: bool) -> bool:
        """Return True if drafts are in flight, or likely to follow the next sampled token.

        Then a step can be scheduled only when the tokens of the last one are known.

        Args:
            others_wait: prompts are waiting, or being computed.
        """
        if not self._most:
            return False
        if self._open:
            return True
        slots = self._slots.decode_slots()
        if others_wait or len(slots) > _MOST_REQUESTS:
            return False
        return any(self._draft(slot) for slot in slots.tolist())

    def chunks(self, decode_slots: np.ndarray, budget: int, updates: list[TableUpdate]) -> list[PrefillChunk]:
        """Return the chunks of this step, which computes no prompts; their slots then don't decode. Add the
        blocks that they need to ``updates``.

        Args:
            decode_slots: decoding rows, each of which has a block for one token.
            budget: tokens that the step can compute beside them.
        """
        assert not self._open, "a draft is in flight"
        if not self._most or len(decode_slots) > _MOST_REQUESTS:
            return []
        table = self._slots
        # Rows of logits are prepared for as many as there are slots.
        budget = min(budget, len(table.requests) - len(decode_slots))
        chunks = []
        for slot in decode_slots.tolist():
            start = int(table.computed[slot])
            if start != table.known[slot] - 1:
                # Its last token is in flight.
                continue
            draft = self._draft(slot)[: max(0, budget)]
            if draft and cover(table, self._kv, slot, start + 1 + len(draft), updates):
                answer = [int(table.tokens[slot, start]), *draft]
                chunks.append(
                    PrefillChunk(
                        table.requests[slot],
                        slot,
                        start,
                        len(answer),
                        True,
                        answer=answer,
                        num_drafted=len(draft),
                    )
                )
                budget -= len(draft)
                self._open.add(slot)
        return chunks

    def _draft(self, slot: int) -> list[int]:
        table = self._slots
        request = table.requests[slot]
        known = int(table.known[slot])
        # All of them may hold, and another token with them.
        room = int(min(table.limit[slot], table.pause[slot])) - known - 2
        if not request.takes_drafts or room <= 0:
            return []
        history = self._histories.setdefault(slot, _History())
        if known < history.resumes_at:
            return []
        return history.draft(table.tokens[slot, :known], min(self._most, room))

    def settle(self, chunk: PrefillChunk, num_held: int) -> None:
        """Count the tokens of a chunk's draft that hold."""
        self._open.discard(chunk.slot)
        self.drafted += chunk.num_drafted
        self.accepted += num_held
        history = self._histories.get(chunk.slot)
        if history is None:
            return
        history.failures = 0 if num_held else history.failures + 1
        if history.failures:
            pause = min(1 << history.failures, _LONGEST_PAUSE)
            history.resumes_at = int(self._slots.known[chunk.slot]) + pause

    def leave(self, slot: int) -> None:
        """Forget a slot whose request leaves it."""
        self._histories.pop(slot, None)
        self._open.discard(slot)

    def check_idle(self) -> None:
        """Raise AssertionError unless nothing is kept of any slot."""
        assert not (self._histories or self._open), "drafts are left over"
