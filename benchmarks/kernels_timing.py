"""How long something takes on the device, what the machine can do at best, and what a measured case is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Work = Callable[[], object]
#: Found and wanted values, to be compared; of any dtype.
Pair = tuple[torch.Tensor, torch.Tensor]


def dtype_on(device: torch.device) -> torch.dtype:
    """What cases compute in: as models do on a GPU, and in what is fast on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True, slots=True)
class Problem:
    """One call to be timed.

    Attributes:
        run: the call as the engine makes it.
        check: what the call gives, and what it should.
        amount: bytes that have to be moved, or floating point operations that have to be done, per call.
        compute: whether ``amount`` counts operations; bytes otherwise.
        peers: other ways to the same result, by name.
    """

    run: Work
    check: Callable[[], Pair]
    amount: float
    compute: bool = False
    peers: dict[str, Work] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """A problem that is built when its turn comes, so that only one holds memory at a time.

    Attributes:
        kernel: what ``--only`` selects by.
        label: the problem's sizes.
    """

    kernel: str
    label: str
    build: Callable[[], Problem]


class Clock:
    """Median seconds of a call on one device; on a GPU with nothing of its inputs left in the L2 cache."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        """``seconds``: how long to measure each call for, about."""
        self.device = device
        self.seconds = seconds
        # Much larger than any L2, and long enough in passing that the host gets ahead of the device: what
        # lies between two events is the device's time then, not the time to launch.
        size = (1 << 30) // 4 if device.type == "cuda" else 0
        self._flush = torch.zeros(size, dtype=torch.float32, device=device)

    def time(self, work: Work) -> float:
        """Seconds per call, the median."""
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
            # Reading leaves clean lines: after a write the call would pay for bringing them to memory.
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
    """What the machine does at best, as measured: bytes per second, read and written together, of a large
    copy; operations per second of a large matrix product; and the seconds between two events around a kernel
    that does next to nothing, which are part of every other figure."""

    copy: float
    gemm: float
    nothing: float

    @staticmethod
    def measure(clock: Clock, tiny: bool) -> Rates:
        small = torch.zeros(1, device=clock.device)
        size, side = (4 << 20, 256) if tiny else (4 << 30, 8192)
        return Rates(copy_rate(clock, size), gemm_rate(clock, side), clock.time(small.zero_))


def copy_rate(clock: Clock, size: int) -> float:
    """Bytes per second, read and written together, of a copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.time(lambda: target.copy_(source))


def gemm_rate(clock: Clock, side: int) -> float:
    """Operations per second of a product of square matrices."""
    shape = (2, side, side)
    a, b = torch.randn(shape, device=clock.device, dtype=dtype_on(clock.device)).unbind(0)
    return 2 * side**3 / clock.time(lambda: a @ b)
