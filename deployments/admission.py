"""The limit on open requests of an ingress, and when refused clients should come back."""

import asyncio
from abc import ABC, abstractmethod

from starlette.datastructures import QueryParams
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import error_response
from deployments.report import current_report
from deployments.turns import Turns
from engine.errors import Overloaded

#: Refused clients that come back in a second: at least so many for each place, and at most so many in all. A
#: refusal takes 1 to 3 ms of CPU time. If all clients came back a second later, they would leave no time for
#: answers: of ten times as many as 256 places, 2300 wait.
TURNS_PER_PLACE = 0.4
MOST_TURNS = 100.0


#: Key of a scope: the :class:`Place` that the request has.
PLACE = "sightline.place"


class Place(ABC):
    """Share of a limit that an open request holds until nothing works on it any more."""

    def __init__(self) -> None:
        self._holders = 1

    def hold(self, task: asyncio.Future) -> None:
        """Keep the place until ``task`` has ended, beyond the request's response."""
        self._holders += 1
        task.add_done_callback(lambda _: self.end())

    def end(self) -> None:
        """Need it no more: the response has ended, or a task has."""
        self._holders -= 1
        if not self._holders:
            self._leave()

    @abstractmethod
    def _leave(self) -> None:
        """Give the place back."""


class AdmissionLimit:
    """Answers 429 while ``limit`` requests are open that make or stream answers, before it reads the body.

    Attributes:
        limit: the most requests.
        patience_s: see :class:`~deployments.report.SentResponse`.
        active: such requests that are open, or whose work goes on in the background.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.patience_s: float | None = None
        self.active = 0
        self._turns = Turns()

    def around(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind this limit."""

        async def admit(scope: Scope, receive: Receive, send: Send) -> None:
            if (response := current_report().response) is not None:
                response.patience_s = self.patience_s
            if scope["type"] != "http" or not is_work(scope):
                await app(scope, receive, send)
                return
            now = asyncio.get_running_loop().time
            if self.active >= self.limit:
                error = Overloaded(f"More than {self.limit} requests are open; try again shortly.")
                least = min(max(TURNS_PER_PLACE * self.limit, 1.0), MOST_TURNS)
                error.retry_after_s = self._turns.book(now(), least)
                await error_response(error, scope)(scope, receive, send)
                return
            if self.active < self.limit / 2:
                # Clients that were refused have not come back.
                self._turns.clear()
            self.active += 1
            place = _Admitted(self)
            try:
                await app({**scope, PLACE: place}, receive, send)
            finally:
                place.end()

        return admit


class _Admitted(Place):
    """The place of a request that ``limit`` has admitted."""

    def __init__(self, limit: AdmissionLimit) -> None:
        super().__init__()
        self._limit = limit

    def _leave(self) -> None:
        self._limit.active -= 1
        self._limit._turns.ended(asyncio.get_running_loop().time())


def is_work(scope: Scope) -> bool:
    """Return whether a request may last as an answer does: a POST that doesn't cancel one, or a GET of a
    response's events. All others are let in where limits are reached: they say how work stands, or end it."""
    of_response = scope["path"].startswith("/v1/responses/")
    if scope["method"] == "POST":
        return not (of_response and scope["path"].endswith("/cancel"))
    return of_response and scope["method"] == "GET" and asks_for_events(QueryParams(scope["query_string"]))


def asks_for_events(query: QueryParams) -> bool:
    """Return whether a GET of a response is to give its events, not the response as it is."""
    return query.get("stream", "false").lower() == "true"
