"""Counters and times of an engine, as a plain snapshot."""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.outputs import Usage

#: Upper bounds in seconds, roughly a factor of two apart.
TIME_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)

#: Upper bounds for numbers of requests or items.
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(slots=True)
class Histogram:
    """Counts of values by upper bound. A value lies in the first bucket whose bound isn't below it; the last
    bucket is unbounded. Written by one thread; others may take snapshots."""

    bounds: Sequence[float] = TIME_BUCKETS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.total += value * count

    def snapshot(self) -> dict:
        """The counts of the bounded buckets, and ``count`` and ``sum`` of all values."""
        return {
            "buckets": dict(zip(self.bounds, self.counts, strict=False)),
            "count": sum(self.counts),
            "sum": self.total,
        }


class Rate:
    """Events per second over the last ``window`` seconds. One thread adds, any thread reads."""

    def __init__(self, window: int = 10) -> None:
        self._window = window
        self._counts: deque[tuple[int, int]] = deque()

    def add(self, count: int, now: float) -> None:
        second = int(now)
        if self._counts and self._counts[-1][0] == second:
            count += self._counts.pop()[1]
        self._counts.append((second, count))
        while self._counts[0][0] < second - self._window:
            self._counts.popleft()

    def value(self, now: float) -> float:
        """The rate over the seconds that have passed; seconds without an entry count as 0."""
        # A copy: the other thread may add meanwhile, which ends an iteration over a deque with an error.
        counts, oldest = tuple(self._counts), int(now) - self._window
        return sum(count for second, count in counts if oldest <= second < int(now)) / self._window


@dataclass(slots=True)
class EngineMetrics:
    """Times of requests, in seconds: waiting for a slot, to the first token, between tokens."""

    queue_time: Histogram = field(default_factory=Histogram)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    time_between_tokens: Histogram = field(default_factory=Histogram)
    token_rate: Rate = field(default_factory=Rate)
    requests_finished: int = 0
    completion_tokens: int = 0

    def observe_first_token(self, arrival: float, admitted_at: float | None, now: float) -> None:
        self.queue_time.observe((admitted_at or now) - arrival)
        self.time_to_first_token.observe(now - arrival)

    def observe_gap(self, seconds: float, count: int = 1) -> None:
        self.time_between_tokens.observe(seconds, count)

    def observe_tokens(self, count: int, now: float) -> None:
        self.token_rate.add(count, now)

    def observe_finish(self, usage: Usage) -> None:
        self.requests_finished += 1
        self.completion_tokens += usage.completion_tokens

    def snapshot(self) -> dict:
        return {
            "queue_time_s": self.queue_time.snapshot(),
            "time_to_first_token_s": self.time_to_first_token.snapshot(),
            "time_between_tokens_s": self.time_between_tokens.snapshot(),
            "tokens_per_second": self.token_rate.value(time.monotonic()),
            "requests_finished": self.requests_finished,
            "completion_tokens": self.completion_tokens,
        }
