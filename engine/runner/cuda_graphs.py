"""Captured decode steps: a forward pass per batch size, and each way of sampling from its logits."""

from __future__ import annotations

from bisect import bisect_left
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
    """Replays decode steps, whose whole state is on the device, and the ends of steps with prompt chunks.

    The forward pass and each sampling plan are separate graphs, so that all plans share one forward pass and
    its logits. A step with chunks has its forward pass elsewhere: the logits of its hidden states, and
    sampling from them, are one graph.

    Args:
        forward: slots ``(D,)`` to the logits ``(D, vocabulary)`` of their next tokens.
        head: hidden states ``(D, width)`` to logits.
        sample: slots, logits and a plan to tokens ``(D,)``; also advances the slots' state.
        capture: see :class:`engine.graphs.Capture`.
        slots: int64 ``(num_slots,)``, the slots of a step, and the padding slot behind them.
        hidden: ``(num_slots, width)``, the hidden states of a step with chunks.
        padding_slot: slot of padding rows.
    """

    def __init__(
        self,
        forward: Forward,
        head: Forward,
        sample: Sample,
        capture: Capture,
        *,
        slots: torch.Tensor,
        hidden: torch.Tensor,
        padding_slot: int,
    ) -> None:
        self._forward, self._head, self._sample, self._capture = forward, head, sample, capture
        self._sizes = bucket_sizes(len(slots))
        self._padding_slot = padding_slot
        self._slots, self._hidden = slots, hidden
        self._forwards: dict[int, Replay] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._samples: dict[tuple[int, Hashable], Replay] = {}
        self._ends: dict[tuple[int, Hashable], Replay] = {}

    def capture_all(self, plans: Iterable[Hashable]) -> None:
        """Capture every batch size, and each of ``plans`` for it."""
        plans = tuple(plans)
        for size in reversed(self._sizes):
            self._forward_of(size)
            for plan in plans:
                self._sample_of(size, plan)
                self._end_of(size, plan)

    def size_for(self, count: int) -> int:
        """The captured batch size that ``count`` rows are padded to."""
        return self._sizes[bisect_left(self._sizes, count)]

    def replay(self, count: int, plan: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits and tokens of the first ``count`` slots: views that the next replay overwrites.

        Args:
            plan: must not need the host. With None the caller samples, and no tokens are returned.
        """
        size = self.size_for(count)
        forward = self._forward_of(size)
        sample = None if plan is None else self._sample_of(size, plan)
        logits = forward()
        return logits[:count], None if sample is None else sample()[:count]

    def end(self, count: int, plan: Any) -> torch.Tensor:
        """Tokens of the first ``count`` slots, sampled from the hidden states of a step with chunks.

        Logits are not returned: keeping them for every size and plan would take gigabytes.
        """
        return self._end_of(self.size_for(count), plan)()[:count]

    def _forward_of(self, size: int) -> Replay:
        if size not in self._forwards:
            self._forwards[size] = self._captured(size, self._forward)
            self._logits[size] = self._forwards[size]()
        return self._forwards[size]

    def _sample_of(self, size: int, plan: Any) -> Replay:
        if (size, plan) not in self._samples:
            logits = self._logits[size]
            self._samples[size, plan] = self._captured(size, lambda slots: self._sample(slots, logits, plan))
        return self._samples[size, plan]

    def _end_of(self, size: int, plan: Any) -> Replay:
        if (size, plan) not in self._ends:
            hidden = self._hidden[:size]
            self._ends[size, plan] = self._captured(
                size, lambda slots: self._sample(slots, self._head(hidden), plan)
            )
        return self._ends[size, plan]

    def _captured(self, size: int, work: Callable[[torch.Tensor], Any]) -> Replay:
        """Capture ``work`` over the first ``size`` slots. No request's state advances meanwhile."""
        slots = self._slots[:size]
        saved = slots.clone()
        slots.fill_(self._padding_slot)
        replay = self._capture(lambda: work(slots))
        slots.copy_(saved)
        return replay
