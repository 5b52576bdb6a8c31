"""A cache within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class LruCache(Generic[T]):
    """Keeps values by key; the least recently used go first. Not thread-safe.

    Attributes:
        budget: most bytes of all values together; 0 keeps none.
        bytes: of the values that are kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> T | None:
        """The value of ``key``; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: T, size: int) -> None:
        """Keep ``value`` of ``size`` bytes, unless there is one of ``key`` or it exceeds the budget alone."""
        if key in self._entries or size > self.budget:
            return
        self._entries[key] = value, size
        self.bytes += size
        self.limit(self.budget)

    def limit(self, budget: int) -> None:
        """Keep no more than ``budget`` bytes, now and later."""
        self.budget = budget
        while self.bytes > self.budget:
            _, (_, size) = self._entries.popitem(last=False)
            self.bytes -= size
