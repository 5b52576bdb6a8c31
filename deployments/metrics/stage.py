"""Metrics that every stage keeps of its own requests."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.metrics.families import Counter, Family
from deployments.tracing import OpenSpan, Tracer
from engine.errors import SightlineError
from engine.metrics import Histogram

#: Upper bounds in seconds of the time that a request takes.
DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


OUTCOMES = ("ok", "refused", "failed", "cancelled")


def outcome(error: BaseException | None) -> str:
    """Return how a request ended: ``ok``; ``refused``, by the caller's fault or for lack of room; ``failed``,
    by the server's fault; ``cancelled``, because its client left or the rest of its request failed."""
    if error is None:
        return "ok"
    if isinstance(error, SightlineError):
        return "refused" if error.status < 500 else "failed"
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return "failed"


class StageMeter:
    """Counts, times and traces the requests of one stage in this process. Used on the event loop alone.

    Args:
        name: of the stage.
        queue: returns the number of images, items or requests that wait for the stage to work on them.
        batches: returns the sizes of batches as a snapshot of a histogram.
        tracer: makes a span for each request.
    """

    def __init__(
        self,
        name: str,
        queue: Callable[[], int],
        batches: Callable[[], dict],
        tracer: Tracer | None = None,
    ) -> None:
        self._name = name
        self._tracer = tracer or Tracer()
        self._queue = queue
        self._batches = batches
        self._requests = Counter(
            "sightline_stage_requests_total",
            "Requests by the way in which they ended.",
            "outcome",
            known=OUTCOMES,
        )
        self._duration = Histogram(DURATION_BUCKETS)
        self._running = 0
        self._received = self._sent = 0
        self._started = time.time()

    @contextmanager
    def request(self) -> Iterator[OpenSpan]:
        """Count, time and trace the request that the block serves."""
        began = time.perf_counter()
        self._running += 1
        error: BaseException | None = None
        try:
            with self._tracer.span(self._name) as span:
                yield span
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._running -= 1
            self._duration.observe(time.perf_counter() - began)
            self._requests.add(outcome(error))

    def count_bytes(self, received: int = 0, sent: int = 0) -> None:
        """Count bytes of images, pixels or embedding rows."""
        self._received += received
        self._sent += sent

    def families(self) -> list[Family]:
        """The metrics that all stages have."""
        of = Family.of
        return [
            self._requests.family(),
            of(
                "sightline_stage_request_duration_seconds",
                "histogram",
                "Time from a request's arrival at the replica to its end.",
                self._duration.snapshot(),
            ),
            of("sightline_stage_running_requests", "gauge", "Requests at the replica.", self._running),
            of(
                "sightline_stage_queue_length",
                "gauge",
                "Images, items or requests at the replica that nothing works on yet.",
                self._queue(),
            ),
            of(
                "sightline_stage_batch_size",
                "histogram",
                "Images of a request, items of a launch, or requests of a step.",
                self._batches(),
            ),
            of(
                "sightline_stage_received_bytes_total",
                "counter",
                "Bytes of images, pixels or embedding rows that came in.",
                self._received,
            ),
            of(
                "sightline_stage_sent_bytes_total",
                "counter",
                "Bytes of pixels or embedding rows that were made.",
                self._sent,
            ),
            of(
                "sightline_stage_start_time_seconds",
                "gauge",
                "When the replica was ready, in seconds of Unix time.",
                self._started,
            ),
        ]
