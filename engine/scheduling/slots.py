"""Counters of running requests as arrays by slot, so that a step costs a few vector operations.

Steady decode touches every running request in every step. With one Python object per request that is the
host's largest cost at 256 requests; with arrays it hardly depends on their number.
"""

from __future__ import annotations

import numpy as np

from engine.request import Request


class SequenceSlots:
    """State of ``num_slots`` slots, one row of each array per slot.

    Attributes:
        requests: object ``(num_slots,)``, the row's :class:`Request`, or None where it is free.
        tokens: int32 ``(num_slots, max_len)``, the known tokens of each row.
        known: tokens the host knows.
        computed: tokens whose keys and values are written by enqueued steps.
        limit: most tokens the row's request may reach.
        pause: known tokens at which the row stops decoding until the last of them has arrived: ``limit``, or
            fewer if the request is computed again at that length.
        capacity: tokens that its KV blocks hold.
        epoch: number of requests that have left the row.
        decoding: rows that compute one sampled token per step.
        constrained: rows whose tokens follow a grammar.
        num_constrained: their number.
        stop_ids: int32 ``(num_slots, K)``, padded with -1.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.requests = np.full(num_slots, None, object)
        self.tokens = np.zeros((num_slots, max_len), np.int32)
        self.known = np.zeros(num_slots, np.int64)
        self.computed = np.zeros(num_slots, np.int64)
        self.limit = np.zeros(num_slots, np.int64)
        self.pause = np.zeros(num_slots, np.int64)
        self.capacity = np.zeros(num_slots, np.int64)
        self.epoch = np.zeros(num_slots, np.int64)
        self.decoding = np.zeros(num_slots, bool)
        self.constrained = np.zeros(num_slots, bool)
        self.num_constrained = 0
        self.stop_ids = np.full((num_slots, 1), -1, np.int32)
        self.min_total = np.zeros(num_slots, np.int64)
        self._free = list(range(num_slots - 1, -1, -1))
        self._decode_slots = np.zeros(0, np.int64)
        self._decode_epochs = np.zeros(0, np.int64)
        self._decode_requests: list[Request | None] = []
        self._stale = False

    @property
    def num_free(self) -> int:
        return len(self._free)

    def enter(self, request: Request, computed: int, capacity: int) -> int:
        """Give ``request`` a free row, which is not decoding yet; return the row's index."""
        slot = self._free.pop()
        count = len(request.token_ids)
        request.slot = slot
        self.requests[slot] = request
        self.constrained[slot] = request.grammar is not None
        self.num_constrained += request.grammar is not None
        self.tokens[slot, :count] = request.ids
        self.known[slot] = count
        self.computed[slot] = computed
        self.limit[slot] = self.pause[slot] = request.max_total
        self.capacity[slot] = capacity
        self.min_total[slot] = request.num_prompt + request.params.min_tokens
        stops = sorted(request.stop_ids)
        if len(stops) > self.stop_ids.shape[1]:
            wider = np.full((len(self.stop_ids), len(stops)), -1, np.int32)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(stops)] = stops
        return slot

    def leave(self, slot: int) -> None:
        """Free the row. Its tokens that are still in flight will be ignored."""
        request = self.requests[slot]
        assert request is not None
        request.slot = None
        self.requests[slot] = None
        self.num_constrained -= bool(self.constrained[slot])
        self.constrained[slot] = False
        self.epoch[slot] += 1
        self.set_decoding(slot, False)
        self._free.append(slot)

    def set_decoding(self, slot: int, on: bool) -> None:
        if self.decoding[slot] != on:
            self.decoding[slot] = on
            self._stale = True

    def decode_slots(self) -> np.ndarray:
        """Return the indices of decoding rows: the same array object until the set changes."""
        if self._stale:
            self._decode_slots = self.decoding.nonzero()[0]
            self._decode_epochs = self.epoch[self._decode_slots]
            self._decode_requests = self.requests[self._decode_slots].tolist()
            self._stale = False
        return self._decode_slots

    def epochs_of(self, slots: np.ndarray) -> np.ndarray:
        """Return ``epoch[slots]``; cached for the decoding rows."""
        return self._decode_epochs if slots is self.decode_slots() else self.epoch[slots]

    def live_requests(self, slots: np.ndarray, epochs: np.ndarray) -> tuple[list[Request | None], bool]:
        """Return the request of each row, None for a row whose request has left since ``epochs``; and True if
        there is no such row. A row that decodes now still has its request."""
        if slots is self.decode_slots():
            return self._decode_requests, True
        live = self.epoch[slots] == epochs
        requests = self.requests[slots]
        requests[~live] = None
        return requests.tolist(), bool(live.all())

    def known_tokens(self, slot: int) -> list[int]:
        return self.tokens[slot, : self.known[slot]].tolist()

    def check_idle(self) -> None:
        """Raise AssertionError unless every row is free."""
        assert len(self._free) == len(self.requests) == len(set(self._free)), "a slot is lost"
        assert not self.decoding.any() and not any(self.requests)
