"""CUDA graphs: work that is captured once and replayed without launching each of its kernels again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from engine.collector import COLLECTOR

Replay = Callable[[], Any]


class Capture(Protocol):
    """Captures work over tensors that stay where they are."""

    def __call__(self, work: Callable[[], Any]) -> Replay:
        """Run ``work`` and capture it.

        Returns:
            A function that repeats the work on the tensors' present values. It returns the result that
            ``work`` returned during the capture: the same tensors every time, with new values in them.
        """


class CudaCapture:
    """Captures CUDA graphs.

    All graphs share one memory pool, because no two run at the same time. Capture the largest first: the
    smaller ones then fit into its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> Replay:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(before)
        # If the garbage collector frees device memory during a capture, the capture can fail. Collecting
        # before each capture, as torch.cuda.graph does, would take most of the time of a hundred captures.
        with COLLECTOR.paused(), torch.cuda.stream(self._stream):
            # Outside of the capture kernels are compiled and libraries choose their algorithms.
            work()
            # Other threads may use the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        before.wait_stream(self._stream)

        def replay() -> Any:
            graph.replay()
            return result

        return replay


def make_capture(device: torch.device, *, enforce_eager: bool) -> Capture | None:
    """The capture for ``device``; None if everything runs eagerly."""
    return CudaCapture(device) if device.type == "cuda" and not enforce_eager else None
