"""Work for a GPU, recorded once and replayed without the host's launching every kernel of it again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

Replay = Callable[[], Any]


class Recorder(Protocol):
    """Turns work over tensors that stay where they are into something that repeats it."""

    def __call__(self, work: Callable[[], Any]) -> Replay:
        """Record ``work``, running it once; each replay computes with what the tensors then hold.

        A replay returns what ``work`` returned while it was recorded: the same tensors every time, with new
        values in them.
        """


def rerun(work: Callable[[], Any]) -> Replay:
    """The recorder of devices that have no graphs: a replay runs the work anew, and keeps what comes of it in
    the tensors that the recording gave."""
    result = work()

    def replay() -> Any:
        for kept, new in zip(tree_leaves(result), tree_leaves(work()), strict=True):
            kept.copy_(new)
        return result

    return replay


class CudaRecorder:
    """Records CUDA graphs.

    All share one memory pool, since they never run at the same time: recorded from the largest on, the small
    ones fit into what the large ones took.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> Replay:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(before)
        # Memory that the collector frees in the midst of a recording could break it off. Collecting before
        # each, as torch.cuda.graph does, would take most of the time of a hundred recordings.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                # Kernels compile and libraries pick their algorithms outside of the recording.
                work()
                # Other threads may go on using the device.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = work()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        before.wait_stream(self._stream)

        def replay() -> Any:
            graph.replay()
            return result

        return replay


def make_recorder(device: torch.device, *, enforce_eager: bool) -> Recorder | None:
    """What records for ``device``; None where nothing is to be recorded."""
    return CudaRecorder(device) if device.type == "cuda" and not enforce_eager else None
