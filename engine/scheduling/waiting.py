"""The queue of requests that wait for a slot."""

from __future__ import annotations

import heapq
import itertools

from engine.request import Request


class WaitingQueue:
    """Requests by priority (the smallest number first), then by arrival.

    Attributes:
        tokens: known tokens of all requests that wait.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request]] = []
        self._count = 0
        self.tokens = 0
        # Equal priorities and arrivals must not compare requests.
        self._order = itertools.count()

    def __len__(self) -> int:
        return self._count

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.priority, request.arrival, next(self._order), request))
        self._count += 1
        self.tokens += len(request.token_ids)

    def first(self) -> Request | None:
        """Return the next request, or None if no request waits."""
        while self._heap and self._heap[0][-1].finished:
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Request:
        """Take out the request that :meth:`first` returned."""
        request = heapq.heappop(self._heap)[-1]
        self._leave(request)
        return request

    def forget(self, request: Request) -> None:
        """Remove a finished request from the counts; its entry is removed when it comes first."""
        assert request.finished
        self._leave(request)
        if not self._count:
            self._heap.clear()

    def _leave(self, request: Request) -> None:
        self._count -= 1
        self.tokens -= len(request.token_ids)

    def requests(self) -> list[Request]:
        """Return all waiting requests."""
        return [entry[-1] for entry in self._heap if not entry[-1].finished]
