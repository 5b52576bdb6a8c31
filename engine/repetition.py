"""Finds answers that have begun to repeat themselves, as models do that read long pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from engine.errors import InvalidRequest
from engine.param_checks import check_int

#: Longest pattern, and most repetitions, that may be asked for.
MAX_PATTERN, MAX_COUNT = 2048, 1 << 20


@dataclass(frozen=True, slots=True)
class RepetitionDetection:
    """When an answer ends because it repeats itself: its last tokens are a pattern several times in a row.

    Attributes:
        max_pattern_size: most tokens of the pattern, at most 2048; 0 looks for none.
        min_pattern_size: fewest tokens of it; 0 is 1.
        min_count: how often the pattern stands there, at least 2.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    @classmethod
    def of(cls, given: Any) -> RepetitionDetection | None:
        """Check what a caller gives, an object of this class or its fields by name; None looks for nothing.

        Raises:
            InvalidRequest: naming the field.
        """
        name = "repetition_detection"
        if isinstance(given, Mapping):
            if unknown := given.keys() - {field.name for field in fields(cls)}:
                raise InvalidRequest(f"{name} has no field {min(map(str, unknown))[:40]}.", param=name)
            given = cls(**given)
        if given is None:
            return None
        if not isinstance(given, cls):
            raise InvalidRequest(f"{name} must be an object.", param=name)
        check_int(f"{name}.max_pattern_size", given.max_pattern_size, 0, MAX_PATTERN)
        check_int(f"{name}.min_pattern_size", given.min_pattern_size, 0, given.max_pattern_size)
        least = 2 if given.max_pattern_size else 0
        check_int(f"{name}.min_count", given.min_count, least, MAX_COUNT)
        return given if given.max_pattern_size else None


class RepetitionWatch:
    """Watches one answer.

    Args:
        wanted: the repetition that ends it.
    """

    def __init__(self, wanted: RepetitionDetection) -> None:
        self._longest = wanted.max_pattern_size
        sizes = np.arange(1, self._longest + 1)
        # Of a pattern of each size: how many last tokens must equal those one pattern before them.
        self._needed = sizes * (wanted.min_count - 1)
        self._needed[: max(wanted.min_pattern_size, 1) - 1] = np.iinfo(np.int64).max
        self._equal = np.zeros(self._longest, dtype=np.int64)
        # The last tokens, the latest first; written from the end of the buffer to its beginning.
        self._buffer = np.full(4 * self._longest, -1, dtype=np.int64)
        self._first = len(self._buffer) - self._longest

    def add(self, token: int) -> bool:
        """Add the next token; return whether the answer repeats itself now."""
        last = self._buffer[self._first : self._first + self._longest]
        self._equal = np.where(last == token, self._equal + 1, 0)
        if not self._first:
            self._first = len(self._buffer) - self._longest
            self._buffer[self._first :] = last
        self._first -= 1
        self._buffer[self._first] = token
        return bool((self._equal >= self._needed).any())
