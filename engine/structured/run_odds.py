"""Which tokens a grammar alone decides behind the next sampled one, and how often: learned from answers."""

from __future__ import annotations

from collections.abc import Sequence

#: States that are told apart; beyond them, all are learned anew.
_MOST_STATES = 4096
#: Sampled tokens since the last forced one that are told apart, and forced ones before them: a key and what
#: stands around it.
_MOST_SINCE, _BEFORE = 64, 8
#: Odds of a state not seen before: forced tokens come in clusters.
_SOON, _LATER = 0.25, 0.05
#: Odds of foreseen runs above which a step computes one before it is certain: otherwise its rows cost more
#: than the step that a hit saves.
_SURE = 0.75
#: Tokens of a state whose runs are kept, and the longest of these; longer ones take a step of their own.
_MOST_RUNS, _LONGEST = 8, 256
#: Stands for any token.
ANY = -1
#: Sampled tokens since the last forced one, below which more of them are likely to come soon.
_RECENT = 4


class _Count:
    """Tokens sampled in a state, and the runs of forced tokens that followed them.

    ``run`` is the one that followed most often, if it did more often than all others together, and ``same``
    how often it did. ``runs`` has the latest ones behind some tokens; ``foreseen`` counts what came again.
    """

    __slots__ = ("followed", "foreseen", "prior", "run", "runs", "same", "seen")

    def __init__(self, prior: float) -> None:
        self.seen, self.followed, self.prior = 0, 0, prior
        self.run: tuple[int, ...] = ()
        self.same = 0
        self.runs: dict[int, tuple[int, ...]] = {}
        self.foreseen = 0

    def add(self, token: int, run: Sequence[int]) -> None:
        """``token`` was sampled in this state, and ``run`` followed."""
        self.seen += 1
        if not run:
            return
        self.followed += 1
        if len(run) > _LONGEST:
            return
        known = self.runs.get(token)
        if known is not None and len(known) == len(run) and known == tuple(run):
            self.foreseen += 1
        elif known is not None or len(self.runs) < _MOST_RUNS:
            self.runs[token] = tuple(run)
        if len(run) == len(self.run) and tuple(run) == self.run:
            self.same += 1
        elif 2 * self.same < self.followed:
            self.run, self.same = tuple(run), 1

    @property
    def expected(self) -> dict[int, tuple[int, ...]]:
        """The runs that will most likely follow, by the token before them, or :data:`ANY`."""
        if max(self.same, self.foreseen) < _SURE * (self.seen + 1):
            return {}
        return self.runs if self.foreseen > self.same else {ANY: self.run}


class RunOdds:
    """Counts of one grammar, shared by all sequences that follow it.

    A sequence's state is known by the tokens allowed, by the forced ones before it and by how many were
    sampled since: a grammar's parts differ in the first, fields of one type in the second, and in a text of
    bounded length the third tells how near its end is. Two states that look the same share their counts, so
    the odds are no more than a hint.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[int, tuple[int, ...], int], _Count] = {}

    def of(self, allowed: int, before: tuple[int, ...], since: int) -> _Count:
        """The count of a state, to be read and added to.

        Args:
            allowed: a number that is equal for equal masks.
            before: the last forced tokens.
            since: tokens sampled since them.
        """
        count = self._counts.get((allowed, before, since))
        if count is None:
            if len(self._counts) >= _MOST_STATES:
                self._counts.clear()
            count = self._counts[allowed, before, since] = _Count(_SOON if since < _RECENT else _LATER)
        return count


class RunForecast:
    """Predicts whether forced tokens follow the next token of a sequence.

    Args:
        odds: those of its grammar.

    Attributes:
        odds: those that forced tokens follow the token that a step in flight samples; 0 if there is none, or
            if that token is known.
    """

    def __init__(self, odds: RunOdds) -> None:
        self._grammar, self._since, self.odds = odds, _RECENT, 0.0
        self._count: _Count | None = None
        self._before: tuple[int, ...] = ()

    @property
    def expected(self) -> dict[int, tuple[int, ...]]:
        """The runs of forced tokens of which one most likely follows that token, by the token or :data:`ANY`;
        empty if none is likely."""
        return {} if self._count is None else self._count.expected

    def sampling(self, allowed: int) -> None:
        """A step samples the next token; ``allowed`` is a number that is equal for equal masks."""
        self._count = count = self._grammar.of(allowed, self._before, self._since)
        self.odds = (count.followed + count.prior) / (count.seen + 1)

    def sampled(self, token: int, run: Sequence[int]) -> None:
        """The ``token`` is known, and the ``run`` of forced ones that follow it."""
        if self._count is not None:
            self._count.add(token, run)
            self._count = None
        self._since = 0 if run else min(self._since + 1, _MOST_SINCE)
        if run:
            self._before = tuple(run[-_BEFORE:])
        self.odds = 0.0
