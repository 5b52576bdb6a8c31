"""The queue of requests that wait for a slot."""

from __future__ import annotations

from engine.goal_queue import GoalQueue, Place
from engine.request import Request


class WaitingQueue:
    """Requests by priority (the smallest number first), then those that are not late, then by arrival.

    Attributes:
        tokens: known tokens of all requests that wait.
    """

    def __init__(self) -> None:
        self._queue: GoalQueue[Request] = GoalQueue()
        self._places: dict[Request, Place[Request]] = {}
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def num_late(self) -> int:
        """Requests that have become late while they waited, since the start."""
        return self._queue.num_late

    def push(self, request: Request) -> None:
        # An answer that has begun is never late: it goes on as soon as it can.
        deadline = None if request.has_begun else request.deadline
        self._places[request] = self._queue.push(
            request, priority=request.priority, arrival=request.arrival, deadline=deadline
        )
        self.tokens += len(request.token_ids)

    def first(self) -> Request | None:
        """Return the next request, or None if no request waits."""
        return self._queue.first()

    def pop(self) -> Request:
        """Take out the request that :meth:`first` returned."""
        request = self._queue.pop()
        del self._places[request]
        self.tokens -= len(request.token_ids)
        return request

    def forget(self, request: Request) -> None:
        """Take out a request for which nobody waits any more. Does nothing if it isn't there."""
        if (place := self._places.pop(request, None)) is not None:
            self._queue.remove(place)
            self.tokens -= len(request.token_ids)

    def requests(self) -> list[Request]:
        """Return all waiting requests."""
        return list(self._queue)
