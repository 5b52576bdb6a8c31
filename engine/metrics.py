"""What an engine counts and times, as a plain snapshot."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.outputs import Usage

#: Upper bounds in seconds, roughly a factor of two apart.
TIME_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


@dataclass(slots=True)
class Histogram:
    """Counts by upper bound, in the form Prometheus wants; the last bucket is unbounded."""

    bounds: Sequence[float] = TIME_BUCKETS
    counts: list[int] = field(default_factory=lambda: [0] * (len(TIME_BUCKETS) + 1))
    total: float = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def snapshot(self) -> dict:
        return {
            "buckets": dict(zip(self.bounds, self.counts, strict=False)),
            "count": sum(self.counts),
            "sum": self.total,
        }


@dataclass(slots=True)
class EngineMetrics:
    """Times of requests, in seconds: waiting for a slot, to the first token, between tokens."""

    queue_time: Histogram = field(default_factory=Histogram)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    time_between_tokens: Histogram = field(default_factory=Histogram)
    requests_finished: int = 0
    completion_tokens: int = 0

    def observe_first_token(self, arrival: float, admitted_at: float | None, now: float) -> None:
        self.queue_time.observe((admitted_at or now) - arrival)
        self.time_to_first_token.observe(now - arrival)

    def observe_gap(self, seconds: float) -> None:
        self.time_between_tokens.observe(seconds)

    def observe_finish(self, usage: Usage) -> None:
        self.requests_finished += 1
        self.completion_tokens += usage.completion_tokens

    def snapshot(self) -> dict:
        return {
            "queue_time_s": self.queue_time.snapshot(),
            "time_to_first_token_s": self.time_to_first_token.snapshot(),
            "time_between_tokens_s": self.time_between_tokens.snapshot(),
            "requests_finished": self.requests_finished,
            "completion_tokens": self.completion_tokens,
        }
