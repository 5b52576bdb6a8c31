"""Embedding rows of media, from a request's admission until the steps that compute their placeholders."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from engine.prompt import EmbeddedMedia
from engine.request import Request
from engine.runner.step_arrays import span_rows
from engine.scheduling.batch import ScheduledBatch
from engine.transfers import upload_shared


@dataclass(frozen=True, slots=True)
class AwaitedRows:
    """Encoder rows ``(num_tokens, width)`` that another rank of the group has."""

    shape: tuple[int, ...]

    @classmethod
    def like(cls, media: EmbeddedMedia | torch.Tensor) -> AwaitedRows:
        return cls(tuple(media.shape if isinstance(media, torch.Tensor) else media.rows.shape))


def embedding_tensor(
    media: EmbeddedMedia | AwaitedRows | torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Encoder rows ``(num_tokens, width)`` on ``device``, contiguous; awaited ones hold nothing yet."""
    if isinstance(media, AwaitedRows):
        return torch.empty(media.shape, dtype=dtype, device=device)
    if isinstance(media, torch.Tensor):
        return media.to(device=device, dtype=dtype).contiguous()
    rows = upload_shared(media.rows.view(np.int16) if media.dtype == "bfloat16" else media.rows, device)
    if media.dtype == "bfloat16":
        rows = rows.view(torch.bfloat16)
    return rows.to(dtype)


class PendingRows:
    """The rows of running requests that are not computed yet, by slot and content hash of the item.

    Args:
        dtype, device: of the model.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._rows: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def slots(self) -> Collection[int]:
        """The slots that were admitted and not released."""
        return self._rows.keys()

    def admit(self, request: Request, slot: int, num_computed: int) -> None:
        """Hold the rows of a request's items beyond its first ``num_computed`` tokens."""
        self._rows[slot] = {
            span.item.hash: embedding_tensor(request.embeddings[span.item.hash], self._dtype, self._device)
            for span in request.spans
            if span.offset + span.length > num_computed
        }

    def release(self, slot: int) -> None:
        """Forget the rows of a slot."""
        self._rows.pop(slot, None)

    def of(self, slot: int) -> Collection[torch.Tensor]:
        """Rows ``(num_tokens, width)`` of each item of a slot."""
        return self._rows[slot].values()

    def take(self, batch: ScheduledBatch) -> list[torch.Tensor]:
        """The rows that a step computes, in the order of its tokens; items that end in it are forgotten."""
        rows: list[torch.Tensor] = []
        for chunk in batch.prefills:
            held, end = self._rows[chunk.slot], chunk.start + chunk.count
            for span in chunk.request.spans:
                first, last, _ = span_rows(span, chunk.start, end)
                if last > first:
                    rows.append(held[span.item.hash][first:last])
            pending = {s.item.hash for s in chunk.request.spans if s.offset + s.length > end}
            self._rows[chunk.slot] = {key: value for key, value in held.items() if key in pending}
        return rows
