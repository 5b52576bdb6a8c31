"""Captured decode steps: a forward pass per batch size, and each way of sampling from its logits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from engine.graphs import Capture, Replay

Forward = Callable[[torch.Tensor], torch.Tensor]
Sample = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]


def bucket_sizes(num_slots: int) -> list[int]:
    """Batch sizes to capture, ascending: all small ones, then steps of 8, 16 and 32."""
    sizes = [1, 2, 3, 4, 6, 8, *range(12, 33, 4), *range(40, 65, 8), *range(80, 129, 16)]
    sizes += range(160, num_slots + 32, 32)
    return [*(size for size in sizes if size < num_slots), num_slots]


class DecodeGraphs:
    """Replays a decode step whose whole state is on the device.

    The step reads its slots from a static buffer; rows beyond the batch use the padding slot. The forward
    pass and each sampling plan are separate graphs, so that all plans share one forward pass and its logits.

    Args:
        forward: slots ``(D,)`` to the logits ``(D, vocabulary)`` of their next tokens.
        sample: slots, logits and a plan to tokens ``(D,)``; also advances the slots' state.
        capture: see :class:`engine.graphs.Capture`.
        num_slots: largest batch.
        padding_slot: slot of padding rows.
        device: device of the state.
    """

    def __init__(
        self,
        forward: Forward,
        sample: Sample,
        capture: Capture,
        *,
        num_slots: int,
        padding_slot: int,
        device: torch.device,
    ) -> None:
        self._forward, self._sample, self._capture = forward, sample, capture
        self._sizes = bucket_sizes(num_slots)
        self._padding_slot = padding_slot
        self._device = device
        self._slots: dict[int, torch.Tensor] = {}
        self._filled: dict[int, torch.Tensor] = {}
        self._forwards: dict[int, Replay] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._samples: dict[tuple[int, Hashable], Replay] = {}

    def capture_all(self, plans: Iterable[Hashable]) -> None:
        """Capture every batch size, and each of ``plans`` for it."""
        plans = tuple(plans)
        for size in reversed(self._sizes):
            self._forward_of(size)
            for plan in plans:
                self._sample_of(size, plan)

    def size_for(self, count: int) -> int:
        """The captured batch size that ``count`` rows are padded to."""
        return next(size for size in self._sizes if size >= count)

    def replay(self, slots: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits and tokens of ``slots`` ``(D,)``: views that the next replay overwrites.

        Args:
            plan: must not need the host. With None the caller samples, and no tokens are returned.
        """
        count = slots.shape[0]
        size = self.size_for(count)
        forward = self._forward_of(size)
        sample = None if plan is None else self._sample_of(size, plan)
        if self._filled.get(size) is not slots:
            # If a copy raises, the next replay copies again.
            self._filled.pop(size, None)
            buffer = self._slots[size]
            buffer[:count] = slots
            buffer[count:] = self._padding_slot
            self._filled[size] = slots
        logits = forward()
        return logits[:count], None if sample is None else sample()[:count]

    def _forward_of(self, size: int) -> Replay:
        if size not in self._forwards:
            slots = self._slots[size] = torch.full(
                (size,), self._padding_slot, dtype=torch.int64, device=self._device
            )
            replay = self._forwards[size] = self._capture(lambda: self._forward(slots))
            self._logits[size] = replay()
        return self._forwards[size]

    def _sample_of(self, size: int, plan: Any) -> Replay:
        if (size, plan) not in self._samples:
            slots, logits = self._slots[size], self._logits[size]
            # No request's state may advance during the capture.
            saved = slots.clone()
            slots.fill_(self._padding_slot)
            self._samples[size, plan] = self._capture(lambda: self._sample(slots, logits, plan))
            slots.copy_(saved)
        return self._samples[size, plan]
