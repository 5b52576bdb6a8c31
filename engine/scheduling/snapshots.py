"""Names copies of recurrent states by the prefixes behind which they were made."""

from __future__ import annotations

from collections import OrderedDict


class SnapshotPool:
    """``num_rows`` rows of states, by the hash of the last block of the prefix that they stand for.

    A snapshot is made at the end of a step, so it can be used from the next step on. When rows are short, the
    one that was not used for longest is given up; a block that is forgotten takes its snapshot with it.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows - 1, -1, -1))
        self._rows: OrderedDict[bytes, int] = OrderedDict()
        self._coming: dict[bytes, int] = {}

    def begin_step(self) -> None:
        """Make the snapshots of the step before usable."""
        self._rows |= self._coming
        self._coming.clear()

    def find(self, key: bytes) -> int | None:
        """Return the row of a snapshot that can be used; None if there is none."""
        return self._rows.get(key)

    def use(self, key: bytes) -> int:
        """Return the row of a snapshot that :meth:`find` has found, and count that as a use."""
        self._rows.move_to_end(key)
        return self._rows[key]

    def is_coming(self, key: bytes) -> bool:
        """Return True if the step that is being scheduled makes a snapshot under ``key``."""
        return key in self._coming

    def take(self, key: bytes) -> int | None:
        """Give a row to a new snapshot; None if there is one under ``key``, or no row to give."""
        if key in self._rows or key in self._coming:
            return None
        if self._free:
            row = self._free.pop()
        elif self._rows:
            _, row = self._rows.popitem(last=False)
        else:
            return None
        self._coming[key] = row
        return row

    def forget(self, key: bytes) -> None:
        """Give up the snapshot under ``key``, if there is one."""
        for rows in (self._rows, self._coming):
            if (row := rows.pop(key, None)) is not None:
                self._free.append(row)

    def forget_all(self) -> None:
        for key in [*self._rows, *self._coming]:
            self.forget(key)

    def keys(self) -> set[bytes]:
        """Return the names of all snapshots."""
        return self._rows.keys() | self._coming.keys()

    def check_integrity(self) -> None:
        """Raise AssertionError unless each row is free or belongs to one snapshot."""
        held = [*self._free, *self._rows.values(), *self._coming.values()]
        assert sorted(held) == list(range(self.num_rows)), "a snapshot is lost"
