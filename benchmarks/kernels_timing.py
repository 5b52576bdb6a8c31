"""Clock for calls on a device, the machine's limits, and what a measured case consists of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Work = Callable[[], object]
#: Results and expected values to compare, of any dtype.
Pair = tuple[torch.Tensor, torch.Tensor]


def dtype_on(device: torch.device) -> torch.dtype:
    """Return the dtype of cases: bfloat16 on a GPU, as models have it; float32 on a CPU, where it is fast."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True, slots=True)
class Problem:
    """A call to measure.

    Attributes:
        run: the call as the engine makes it.
        check: returns the call's result and the expected one.
        amount: bytes that a call has to move, or floating point operations that it has to do.
        compute: whether ``amount`` counts operations; bytes otherwise.
        peers: other implementations of the same, by name.
    """

    run: Work
    check: Callable[[], Pair]
    amount: float
    compute: bool = False
    peers: dict[str, Work] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """A problem that is built when it is measured, so that only one holds memory at a time.

    Attributes:
        kernel: name for ``--only``.
        label: the problem's sizes.
    """

    kernel: str
    label: str
    build: Callable[[], Problem]


class Clock:
    """Measures the median time of a call; on a GPU its inputs are not in the L2 cache."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        """``seconds``: approximate time to measure each call for."""
        self.device = device
        self.seconds = seconds
        # Much larger than any L2 cache. Reading it takes so long that the host runs ahead of the device, and
        # the time between two events is the device's, not that of launching.
        size = (1 << 30) // 4 if device.type == "cuda" else 0
        self._flush = torch.zeros(size, dtype=torch.float32, device=device)

    def time(self, work: Work) -> float:
        """Return the median seconds per call."""
        return self._on_gpu(work) if self.device.type == "cuda" else self._on_cpu(work)

    def _on_cpu(self, work: Work) -> float:
        work()
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def _on_gpu(self, work: Work) -> float:
        for _ in range(3):
            work()
        rounds = max(10, min(100, int(self.seconds / max(self._events(work, 3)[0], 1e-6))))
        return statistics.median(self._events(work, rounds))

    def _events(self, work: Work, rounds: int) -> list[float]:
        pairs = []
        for _ in range(rounds):
            # Read, not written: dirty cache lines would be written back during the call.
            self._flush.sum()
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            work()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize(self.device)
        return [first.elapsed_time(last) * 1e-3 for first, last in pairs]


@dataclass(frozen=True, slots=True)
class Rates:
    """Limits of the machine, as measured.

    Attributes:
        copy: bytes per second, read and written together, of a large copy.
        gemm: operations per second of a large GEMM.
        nothing: seconds between two events around a kernel with almost no work; part of every other time.
    """

    copy: float
    gemm: float
    nothing: float

    @staticmethod
    def measure(clock: Clock, tiny: bool) -> Rates:
        small = torch.zeros(1, device=clock.device)
        size, side = (4 << 20, 256) if tiny else (4 << 30, 8192)
        return Rates(copy_rate(clock, size), gemm_rate(clock, side), clock.time(small.zero_))


def copy_rate(clock: Clock, size: int) -> float:
    """Measure bytes per second, read and written together, of a copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.time(lambda: target.copy_(source))


def gemm_rate(clock: Clock, side: int) -> float:
    """Measure operations per second of a GEMM of square matrices."""
    shape = (2, side, side)
    a, b = torch.randn(shape, device=clock.device, dtype=dtype_on(clock.device)).unbind(0)
    return 2 * side**3 / clock.time(lambda: a @ b)
