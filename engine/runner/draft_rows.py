"""Rows of a step that verify drafts: which of their sampled tokens hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.scheduling.batch import ScheduledBatch


def draft_columns(batch: ScheduledBatch) -> np.ndarray:
    """int64 ``(R, 2 + K)``, the columns of :class:`DraftRows`, with K the length of the longest draft;
    ``(0, 2)`` if no row verifies a draft."""
    longest = max((chunk.num_drafted for chunk in batch.prefills), default=0)
    if not longest:
        return np.zeros((0, 2), np.int64)
    columns = np.full((len(batch.sampling_slots), 2 + longest), -1, np.int64)
    columns[:, 0] = 0
    row = len(batch.decode_slots)
    for chunk in batch.prefills:
        draft = chunk.token_ids[chunk.count - chunk.num_drafted :]
        for offset in range(chunk.sampling_rows):
            columns[row, 0] = offset
            if offset < len(draft):
                columns[row, 1] = draft[offset]
            columns[row, 2 : 2 + offset] = draft[:offset]
            row += 1
    return columns


@dataclass(frozen=True)
class DraftRows:
    """R sampling rows of a step. Those that verify a draft stand together, in its order: the first samples
    what the draft should begin with, each other row what follows another token of the draft.

    Attributes:
        columns: int64 ``(R, 2 + K)``: the number of the draft's tokens before the row; the token that the
            row must sample for the next row to hold, -1 in the last row of a draft; and the draft's tokens
            before the row, -1 beyond them.
    """

    columns: Tensor

    @property
    def offsets(self) -> Tensor:
        """int64 ``(R,)``: tokens of the draft before each row."""
        return self.columns[:, 0]

    @cached_property
    def before(self) -> tuple[Tensor, Tensor]:
        """int64 and int32 ``(R, K)``: tokens of the draft before each row, and 1 for each, else 0."""
        tokens = self.columns[:, 2:]
        return tokens.clamp(min=0), (tokens >= 0).int()

    def held(self, tokens: Tensor) -> Tensor:
        """bool ``(R,)``: the rows that sampled ``tokens`` ``(R,)`` after tokens of the answer alone."""
        wanted = self.columns[:, 1]
        missed = ((tokens != wanted) & (wanted >= 0)).long()
        missed_before = missed.cumsum(0) - missed
        first = torch.arange(len(tokens), device=tokens.device) - self.offsets
        return missed_before == missed_before[first]

    def last(self, held: Tensor) -> Tensor:
        """bool ``(R,)``: the last row of each request that holds."""
        goes_on = torch.zeros_like(held)
        goes_on[:-1] = held[1:] & (self.offsets[1:] > 0)
        return held & ~goes_on
