"""Times of a start, phase by phase, for the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StartTimes:
    """Measures the phases of a start. One thread uses it.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase ``name``."""
        began = self._clock()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + self._clock() - began

    def __str__(self) -> str:
        """Seconds since the start, and of each phase in order."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases.items())
        return f"{self._clock() - self._began:.1f} s ({parts})"
