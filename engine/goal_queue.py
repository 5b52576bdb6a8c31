"""A queue for work with a deadline: under overload, those entries go first that can still meet theirs.

First come, first served makes nearly every answer late once more comes than can be done: whoever is next has
waited for too long already. Here late entries make way, so that the others are on time.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")

#: Places without an entry that are kept beside as many as have one.
_EMPTY_PLACES = 64

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


@dataclass(slots=True, eq=False)
class Place(Generic[T]):
    """Slot of a waiting entry; its entry is None once that has left the queue."""

    entry: T | None


#: (priority, due time, tie-breaker, may be late, place)
_Row: TypeAlias = tuple[int, float, int, bool, Place[T]]


class GoalQueue(Generic[T]):
    """Entries by priority (the smallest number first), then those that are not late, then by due time.

    Attributes:
        num_late: entries that have become late so far.
    """

    def __init__(self) -> None:
        self._punctual: list[_Row[T]] = []
        self._late: list[_Row[T]] = []
        # Equal priorities and times must not compare entries.
        self._order = itertools.count()
        self._count = self._turns = self.num_late = 0
        self._next: list[_Row[T]] | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        entries = (row[-1].entry for rows in (self._punctual, self._late) for row in rows)
        return (entry for entry in entries if entry is not None)

    def push(self, entry: T, *, priority: int = 0, arrival: float, deadline: float | None = None) -> Place[T]:
        """Add an entry; times are those of ``time.monotonic()``.

        Args:
            priority: entries with a smaller number go first, late or not.
            arrival: due time of an entry that is never late.
            deadline: due time after which an entry is late; None if it never is.

        Returns:
            Its place, for :meth:`remove`.
        """
        due, place = arrival if deadline is None else deadline, Place(entry)
        heapq.heappush(self._punctual, (priority, due, next(self._order), deadline is not None, place))
        self._count += 1
        return place

    def remove(self, place: Place[T]) -> bool:
        """Take out the entry of a place, for which nobody waits any more, and let go of it.

        Under overload late entries come first only after a long time, or never.

        Returns:
            False if it has left already.
        """
        if place.entry is None:
            return False
        place.entry = None
        self._count -= 1
        if len(self._punctual) + len(self._late) > 2 * self._count + _EMPTY_PLACES:
            self._next = None
            for heap in (self._punctual, self._late):
                heap[:] = [row for row in heap if row[-1].entry is not None]
                heapq.heapify(heap)
        return True

    def first(self) -> T | None:
        """Return the entry that :meth:`pop` takes out, or None if there is none."""
        now = time.monotonic()
        _drop_empty(self._late)
        _drop_empty(self._punctual)
        while self._punctual and self._punctual[0][3] and self._punctual[0][1] < now:
            heapq.heappush(self._late, heapq.heappop(self._punctual))
            self.num_late += 1
            _drop_empty(self._punctual)
        self._next = self._choose()
        return self._next[0][-1].entry if self._next else None

    def pop(self) -> T:
        """Take out the entry that :meth:`first` has just returned."""
        assert self._next, "nothing was chosen"
        self._turns = 0 if self._next is self._late else self._turns + bool(self._late)
        place = heapq.heappop(self._next)[-1]
        self._next = None
        self._count -= 1
        entry, place.entry = place.entry, None
        assert entry is not None, "it was removed"
        return entry

    def clear(self) -> None:
        """Drop all entries."""
        for heap in (self._punctual, self._late):
            for row in heap:
                row[-1].entry = None
            heap.clear()
        self._count, self._next = 0, None

    def _choose(self) -> list[_Row[T]]:
        """The heap whose first entry is next."""
        if not (self._punctual and self._late):
            return self._punctual or self._late
        punctual, late = self._punctual[0][0], self._late[0][0]
        if punctual != late:
            return self._punctual if punctual < late else self._late
        return self._late if self._turns == LATE_TURN - 1 else self._punctual


def _drop_empty(heap: list[_Row[Any]]) -> None:
    """Drop the first places as long as their entries have left."""
    while heap and heap[0][-1].entry is None:
        heapq.heappop(heap)
