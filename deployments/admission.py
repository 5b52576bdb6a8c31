"""The limit on open requests of an ingress, and when refused clients should come back."""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import error_response
from deployments.turns import Turns
from engine.errors import Overloaded

#: Refused clients that come back in a second: at least so many for each place, and at most so many in all. A
#: refusal takes 1 to 3 ms of CPU time. If all clients came back a second later, they would leave no time for
#: answers: of ten times as many as 256 places, 2300 wait.
TURNS_PER_PLACE = 0.4
MOST_TURNS = 100.0


class AdmissionLimit:
    """Answers 429 while ``limit`` POST requests are open, before it reads the body.

    Attributes:
        limit: the most requests.
        active: POST requests that are open.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.active = 0
        self._turns = Turns()

    def around(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind this limit."""

        async def admit(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
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
            try:
                await app(scope, receive, send)
            finally:
                self.active -= 1
                self._turns.ended(now())

        return admit
