"""The limit on open requests of an ingress, and when refused clients shall come back."""

import asyncio
import math

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import error_response
from engine.errors import Overloaded


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
                response = error_response(error, scope)
                response.headers["Retry-After"] = str(self._turns.book(now()))
                await response(scope, receive, send)
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


class Turns:
    """Gives refused clients turns, no faster than the ingress can refuse them beside its work.

    A refusal takes about a millisecond of the ingress. If all clients came back a second later, they would
    leave it no time for answers: of ten times as many as 256 places, 2300 wait.
    """

    #: Turns in a second. More of them would take more than a tenth of an ingress.
    PER_SECOND = 100.0
    #: Turns for each request that ends, if more end than that. One each would leave places empty.
    PER_PLACE = 1.25
    #: Seconds over which the rate of ended requests is taken.
    WINDOW_S = 5.0
    #: The longest wait in seconds. OpenAI's clients ignore a longer ``Retry-After``.
    LONGEST_S = 60

    def __init__(self) -> None:
        self._ended = 0.0
        self._ended_at = self._next = -math.inf

    def ended(self, now: float) -> None:
        """Count a request that has ended; ``now`` in seconds."""
        self._ended = self._recently(now) + 1
        self._ended_at = now

    def clear(self) -> None:
        """Forget the turns that were given."""
        self._next = -math.inf

    def book(self, now: float) -> int:
        """Give the next turn; seconds until it, at least 1."""
        rate = max(self.PER_SECOND, self.PER_PLACE * self._recently(now) / self.WINDOW_S)
        self._next = min(max(self._next, now + 1) + 1 / rate, now + self.LONGEST_S)
        return round(self._next - now)

    def _recently(self, now: float) -> float:
        """The requests that ended in about the last :attr:`WINDOW_S`."""
        return self._ended * math.exp((self._ended_at - now) / self.WINDOW_S) if self._ended else 0.0
