"""All tokens of the sequences that must not repeat themselves, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.transfers import upload


class TokenHistory:
    """Prompt and output of the slots that must not repeat sequences of tokens.

    Attributes:
        tokens: (R, L + 1) int32, allocated on first use; L grows with the longest sequence. The last column
            takes the tokens of slots without this limit.
        lengths: (R,) int64, known tokens.
        sizes: (R,) int64, ``no_repeat_ngram_size``; 0 where anything may repeat.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows, self._device = num_rows, device
        self._pending: dict[int, tuple[int, list[int]]] = {}
        self._written: set[int] = set()
        # Known tokens of each slot with this limit, less the steps that had added a token by then.
        self._starts: dict[int, int] = {}
        self._steps = 0
        self.tokens: Tensor | None = None
        self.lengths = self.sizes = torch.zeros(0)

    def write(self, slot: int, size: int, token_ids: Sequence[int]) -> None:
        """Takes over a slot. ``size`` 0 costs nothing if the slot never had another.

        Args:
            token_ids: prompt and output so far.
        """
        if size or slot in self._written:
            self._pending[slot] = size, list(token_ids) if size else []
            (self._written.add if size else self._written.discard)(slot)
        if size:
            self._starts[slot] = len(token_ids) - self._steps

    def forget(self, slot: int) -> None:
        """Drop what waits to be written for a slot; what the device holds instead is reset later."""
        self._starts.pop(slot, None)
        if self._pending.pop(slot, None) is not None:
            self._written.add(slot)

    def flush(self) -> None:
        if not self._pending:
            return
        self._make_room()
        assert self.tokens is not None
        for slot, (size, token_ids) in self._pending.items():
            row = upload(np.array([*token_ids, size, len(token_ids)], np.int64), self._device)
            self.tokens[slot, : len(token_ids)] = row[:-2]
            self.sizes[slot], self.lengths[slot] = row[-2], row[-1]
        self._pending.clear()

    def of(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens (N, L), lengths (N,) and sizes (N,) of slots (N,) int64. None of those that have this
        limit is longer than L."""
        assert self.tokens is not None
        return self.tokens[:, : self._longest][slots], self.lengths[slots], self.sizes[slots]

    def advance(self, slots: Tensor, tokens: Tensor) -> None:
        """Adds one more token (N,) per slot (N,), both int64. A slot with this limit comes once."""
        self._make_room()
        assert self.tokens is not None
        self._steps += 1
        limited = self.sizes[slots] > 0
        column = torch.where(limited, self.lengths[slots], self.tokens.shape[1] - 1)
        self.tokens[slots, column] = tokens.int()
        self.lengths.index_add_(0, slots, limited.long())

    @property
    def _longest(self) -> int:
        """Tokens of the longest sequence, or a few more. The host doesn't know in which steps a slot was."""
        return max(self._starts.values(), default=-self._steps) + self._steps

    def _make_room(self) -> None:
        """Allocate a column for one more token of the longest sequence."""
        width = 0 if self.tokens is None else self.tokens.shape[1] - 1
        longest = self._longest
        if longest < width:
            return
        # Powers of two, so that it seldom moves.
        shape = self._num_rows, (1 << longest.bit_length()) + 1
        # A copy from the host would wait for all work that is enqueued.
        wider = torch.zeros(shape, dtype=torch.int32, device=self._device)
        if self.tokens is None:
            self.lengths, self.sizes = torch.zeros(
                (2, self._num_rows), dtype=torch.int64, device=self._device
            )
        else:
            wider[:, :width] = self.tokens[:, :width]
        self.tokens = wider
