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
        tokens: (R, L + 1) int32, allocated on first use; L grows with the longest request. The last column
            takes the tokens of slots without this limit.
        lengths: (R,) int64, known tokens.
        sizes: (R,) int64, ``no_repeat_ngram_size``; 0 where anything may repeat.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows, self._device = num_rows, device
        self._pending: dict[int, tuple[int, list[int], int]] = {}
        self._written: set[int] = set()
        self.tokens: Tensor | None = None
        self.lengths = self.sizes = torch.zeros(0)

    def write(self, slot: int, size: int, token_ids: Sequence[int], max_total: int) -> None:
        """Takes over a slot. ``size`` 0 costs nothing if the slot never had another.

        Args:
            token_ids: prompt and output so far.
            max_total: most tokens it may reach.
        """
        if size or slot in self._written:
            self._pending[slot] = size, list(token_ids) if size else [], max_total if size else 0
            (self._written.add if size else self._written.discard)(slot)

    def forget(self, slot: int) -> None:
        """Drop what waits to be written for a slot; what the device holds instead is reset later."""
        if self._pending.pop(slot, None) is not None:
            self._written.add(slot)

    def flush(self) -> None:
        if not self._pending:
            return
        self._grow(max(max_total for _, _, max_total in self._pending.values()))
        assert self.tokens is not None
        for slot, (size, token_ids, _) in self._pending.items():
            row = upload(np.array([*token_ids, size, len(token_ids)], np.int64), self._device)
            self.tokens[slot, : len(token_ids)] = row[:-2]
            self.sizes[slot], self.lengths[slot] = row[-2], row[-1]
        self._pending.clear()

    def _grow(self, longest: int) -> None:
        width = 0 if self.tokens is None else self.tokens.shape[1] - 1
        if longest <= width and self.tokens is not None:
            return
        # Powers of two, so that it seldom moves.
        wider = torch.zeros((self._num_rows, (1 << longest.bit_length()) + 1), dtype=torch.int32)
        wider = wider.to(self._device)
        if self.tokens is None:
            self.lengths, self.sizes = torch.zeros(
                (2, self._num_rows), dtype=torch.int64, device=self._device
            )
        else:
            wider[:, :width] = self.tokens[:, :width]
        self.tokens = wider

    def advance(self, slots: Tensor, tokens: Tensor) -> None:
        """Adds one more token (N,) per slot (N,), both int64."""
        assert self.tokens is not None
        limited = self.sizes[slots] > 0
        last = self.tokens.shape[1] - 1
        column = torch.where(limited, self.lengths[slots], last).clamp(max=last)
        self.tokens[slots, column] = tokens.int()
        self.lengths.index_add_(0, slots, limited.long())
