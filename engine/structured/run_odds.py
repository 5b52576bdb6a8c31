"""How often tokens that a grammar alone decides follow the next sampled one, learned from its answers."""

from __future__ import annotations

#: States that are told apart; beyond them, all are learned anew.
_MOST_STATES = 4096
#: Sampled tokens since the last forced one that are told apart.
_MOST_SINCE = 64
#: Odds of a state not seen before: forced tokens come in clusters.
_SOON, _LATER = 0.25, 0.05
#: Sampled tokens since the last forced one, below which more of them are likely to come soon.
_RECENT = 4


class _Count:
    """Tokens sampled in a state, and how many of them forced ones followed."""

    __slots__ = ("followed", "prior", "seen")

    def __init__(self, prior: float) -> None:
        self.seen, self.followed, self.prior = 0, 0, prior


class RunOdds:
    """Counts of one grammar, shared by all sequences that follow it.

    A sequence's state is known by the tokens allowed and by how many were sampled since the last forced one:
    a grammar's parts differ in the first, and in a text of bounded length the second tells how near its end
    is. Two states that look the same share their counts, so the odds are no more than a hint.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], _Count] = {}

    def of(self, allowed: int, since: int) -> _Count:
        """The count of a state, to be read and added to.

        Args:
            allowed: a number that is equal for equal masks.
            since: tokens sampled since the last forced one.
        """
        count = self._counts.get((allowed, since))
        if count is None:
            if len(self._counts) >= _MOST_STATES:
                self._counts.clear()
            count = self._counts[allowed, since] = _Count(_SOON if since < _RECENT else _LATER)
        return count


class RunForecast:
    """Whether forced tokens will follow the next one of a sequence.

    Args:
        odds: those of its grammar.

    Attributes:
        odds: those that forced tokens follow the token that a step in flight samples; 0 if there is none, or
            if that token is known.
    """

    def __init__(self, odds: RunOdds) -> None:
        self._grammar, self._since, self.odds = odds, _RECENT, 0.0
        self._count: _Count | None = None

    def sampling(self, allowed: int) -> None:
        """A step samples the next token; ``allowed`` is a number that is equal for equal masks."""
        self._count = count = self._grammar.of(allowed, self._since)
        self.odds = (count.followed + count.prior) / (count.seen + 1)

    def sampled(self, runs: bool) -> None:
        """The token is known; ``runs``: forced ones followed it."""
        if self._count is not None:
            self._count.seen += 1
            self._count.followed += runs
            self._count = None
        self._since = 0 if runs else min(self._since + 1, _MOST_SINCE)
        self.odds = 0.0
