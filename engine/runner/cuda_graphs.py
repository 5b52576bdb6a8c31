"""Captured decode steps, one per batch size and way of sampling."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

DecodeStep = Callable[[torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor | None]]


def bucket_sizes(num_slots: int) -> list[int]:
    """Batch sizes that are captured: all small ones, then steps of 8, 16 and 32."""
    sizes = [1, 2, 3, 4, 6, 8, *range(12, 33, 4), *range(40, 65, 8), *range(80, 129, 16)]
    sizes += range(160, num_slots + 32, 32)
    return [*(size for size in sizes if size < num_slots), num_slots]


class DecodeGraphs:
    """Replays a decode step whose whole state lives on the device.

    The step reads the slots it works on from a static buffer; rows beyond the batch point at the padding
    slot. All graphs share one memory pool, since they never run at the same time, and are captured from the
    largest on, so that the small ones fit into what the large ones took.

    Args:
        step: the decode step; with a plan it samples and advances the state, with None it stops at logits.
        num_slots: largest batch.
        padding_slot: the row that padding works on.
        device: a CUDA device.
    """

    def __init__(self, step: DecodeStep, num_slots: int, padding_slot: int, device: torch.device) -> None:
        self._step = step
        self._sizes = bucket_sizes(num_slots)
        self._padding_slot = padding_slot
        self._device = device
        self._slots: dict[int, torch.Tensor] = {}
        self._filled: dict[int, torch.Tensor] = {}
        self._graphs: dict[tuple[int, Hashable], tuple[torch.cuda.CUDAGraph, torch.Tensor, Any]] = {}
        self._pool: Any = None

    def capture(self, plans: Iterable[Hashable]) -> None:
        """Capture every batch size for each of ``plans``."""
        for plan in plans:
            for size in reversed(self._sizes):
                self._get(size, plan)

    def replay(self, slots: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the step for ``slots`` ``(D,)``; results are views that the next replay overwrites.

        ``plan`` must be one that the sampler can run without the host, or None.
        """
        count = slots.shape[0]
        size = next(size for size in self._sizes if size >= count)
        graph, logits, tokens = self._get(size, plan)
        if self._filled.get(size) is not slots:
            buffer = self._slots[size]
            buffer[:count] = slots
            buffer[count:] = self._padding_slot
            self._filled[size] = slots
        graph.replay()
        return logits[:count], None if tokens is None else tokens[:count]

    def _get(self, size: int, plan: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, Any]:
        if (size, plan) not in self._graphs:
            self._graphs[size, plan] = self._capture(size, plan)
        return self._graphs[size, plan]

    def _capture(self, size: int, plan: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, Any]:
        slots = self._slots.setdefault(
            size, torch.full((size,), self._padding_slot, dtype=torch.int64, device=self._device)
        )
        saved = slots.clone()
        slots.fill_(self._padding_slot)
        # Kernels compile and libraries pick their algorithms outside of the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(slots, plan)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits, tokens = self._step(slots, plan)
        if self._pool is None:
            self._pool = graph.pool()
        slots.copy_(saved)
        return graph, logits, tokens
