"""A queue for work with a deadline: under overload, those entries go first that can still meet theirs.

First come, first served makes nearly every answer late once more comes than can be done: whoever is next has
waited for too long already. Here late entries make way, so that the others are on time.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")

#: (priority, due time, tie-breaker, may be late, entry)
_Row: TypeAlias = tuple[int, float, int, bool, T]

#: While some entries are late, one of this many that are taken is the first of these. So a late entry with n
#: late ones before it leaves among the next ``LATE_TURN * (n + 1)``.
LATE_TURN = 32


def deadline_of(goal_s: float | None, share: float, asked: float | None) -> float | None:
    """Return when work becomes late, by ``time.monotonic()``; None without a goal.

    Args:
        goal_s: seconds from a client's request to its first token.
        share: of these, those that may have passed when the work begins.
        asked: when the client asked, by ``time.time()``, which the clocks of all hosts show; None for now.
    """
    if goal_s is None:
        return None
    passed = 0.0 if asked is None else max(0.0, time.time() - asked)
    return time.monotonic() + share * goal_s - passed


class GoalQueue(Generic[T]):
    """Entries by priority (the smallest number first), then those that are not late, then by due time.

    Args:
        gone: whether nobody waits for an entry any more. It is dropped when its turn comes.

    Attributes:
        num_late: entries that have become late so far.
    """

    def __init__(self, gone: Callable[[T], bool] = lambda _: False) -> None:
        self._gone = gone
        self._punctual: list[_Row[T]] = []
        self._late: list[_Row[T]] = []
        # Equal priorities and times must not compare entries.
        self._order = itertools.count()
        self._turns = self.num_late = 0
        self._next: list[_Row[T]] | None = None

    def __len__(self) -> int:
        return len(self._punctual) + len(self._late)

    def __iter__(self) -> Iterator[T]:
        return (row[-1] for rows in (self._punctual, self._late) for row in rows)

    def push(self, entry: T, *, priority: int = 0, arrival: float, deadline: float | None = None) -> None:
        """Add an entry; times are those of ``time.monotonic()``.

        Args:
            priority: entries with a smaller number go first, late or not.
            arrival: due time of an entry that is never late.
            deadline: due time after which an entry is late; None if it never is.
        """
        due = arrival if deadline is None else deadline
        heapq.heappush(self._punctual, (priority, due, next(self._order), deadline is not None, entry))

    def first(self) -> T | None:
        """Return the entry that :meth:`pop` takes out, or None if there is none."""
        now = time.monotonic()
        self._drop_gone(self._late)
        self._drop_gone(self._punctual)
        while self._punctual and self._punctual[0][3] and self._punctual[0][1] < now:
            heapq.heappush(self._late, heapq.heappop(self._punctual))
            self.num_late += 1
            self._drop_gone(self._punctual)
        self._next = self._choose()
        return self._next[0][-1] if self._next else None

    def pop(self) -> T:
        """Take out the entry that :meth:`first` has just returned."""
        assert self._next, "nothing was chosen"
        self._turns = 0 if self._next is self._late else self._turns + bool(self._late)
        entry = heapq.heappop(self._next)[-1]
        self._next = None
        return entry

    def clear(self) -> None:
        """Drop all entries."""
        self._punctual.clear()
        self._late.clear()
        self._next = None

    def _drop_gone(self, heap: list[_Row[T]]) -> None:
        while heap and self._gone(heap[0][-1]):
            heapq.heappop(heap)

    def _choose(self) -> list[_Row[T]]:
        """The heap whose first entry is next."""
        if not (self._punctual and self._late):
            return self._punctual or self._late
        punctual, late = self._punctual[0][0], self._late[0][0]
        if punctual != late:
            return self._punctual if punctual < late else self._late
        return self._late if self._turns == LATE_TURN - 1 else self._punctual
