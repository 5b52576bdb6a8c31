"""Recorded decode steps, one per batch size and way of sampling."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from engine.graphs import Recorder, Replay

DecodeStep = Callable[[torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor | None]]


def bucket_sizes(num_slots: int) -> list[int]:
    """Batch sizes that are recorded: all small ones, then steps of 8, 16 and 32."""
    sizes = [1, 2, 3, 4, 6, 8, *range(12, 33, 4), *range(40, 65, 8), *range(80, 129, 16)]
    sizes += range(160, num_slots + 32, 32)
    return [*(size for size in sizes if size < num_slots), num_slots]


class DecodeGraphs:
    """Replays a decode step whose whole state lives on the device.

    The step reads the slots it works on from a static buffer; rows beyond the batch point at the padding
    slot.

    Args:
        step: the decode step; with a plan it samples and advances the state, with None it stops at logits.
        record: see :class:`engine.graphs.Recorder`.
        num_slots: largest batch.
        padding_slot: the row that padding works on.
        device: where the state is.
    """

    def __init__(
        self, step: DecodeStep, record: Recorder, num_slots: int, padding_slot: int, device: torch.device
    ) -> None:
        self._step = step
        self._record = record
        self._sizes = bucket_sizes(num_slots)
        self._padding_slot = padding_slot
        self._device = device
        self._slots: dict[int, torch.Tensor] = {}
        self._filled: dict[int, torch.Tensor] = {}
        self._replays: dict[tuple[int, Hashable], Replay] = {}

    def capture(self, plans: Iterable[Hashable]) -> None:
        """Record every batch size for each of ``plans``."""
        for plan in plans:
            for size in reversed(self._sizes):
                self._get(size, plan)

    def replay(self, slots: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the step for ``slots`` ``(D,)``; results are views that the next replay overwrites.

        ``plan`` must be one that the sampler can run without the host, or None.
        """
        count = slots.shape[0]
        size = next(size for size in self._sizes if size >= count)
        replay = self._get(size, plan)
        if self._filled.get(size) is not slots:
            buffer = self._slots[size]
            buffer[:count] = slots
            buffer[count:] = self._padding_slot
            self._filled[size] = slots
        logits, tokens = replay()
        return logits[:count], None if tokens is None else tokens[:count]

    def _get(self, size: int, plan: Any) -> Replay:
        if (size, plan) not in self._replays:
            slots = self._slots.setdefault(
                size, torch.full((size,), self._padding_slot, dtype=torch.int64, device=self._device)
            )
            # Nobody's state may advance while it is recorded.
            saved = slots.clone()
            slots.fill_(self._padding_slot)
            self._replays[size, plan] = self._record(lambda: self._step(slots, plan))
            slots.copy_(saved)
        return self._replays[size, plan]
