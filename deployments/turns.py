"""Turns of clients that were refused: when each shall come back."""

import math


class Turns:
    """Gives refused clients turns as fast as requests end: few come in vain, and no place stays empty."""

    #: Turns for each request that ends. One each would leave places empty.
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

    def book(self, now: float, least: float = 1.0) -> int:
        """Give the next turn.

        Args:
            least: turns in a second, also where fewer requests end or none has ended yet.

        Returns:
            Seconds until the turn, at least 1.
        """
        rate = max(least, self.PER_PLACE * self._recently(now) / self.WINDOW_S)
        self._next = min(max(self._next, now + 1) + 1 / rate, now + self.LONGEST_S)
        return round(self._next - now)

    def _recently(self, now: float) -> float:
        """The requests that ended in about the last :attr:`WINDOW_S`."""
        return self._ended * math.exp((self._ended_at - now) / self.WINDOW_S) if self._ended else 0.0
