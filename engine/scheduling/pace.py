"""How long steps take, and how long the device would be idle if each waited for the last one's tokens."""

from __future__ import annotations

import time

#: Weight of the latest time in the mean.
_WEIGHT = 0.1


class StepPace:
    """Times the parts of steps, in seconds; means that follow the latest ones.

    If a step is scheduled when the last one's tokens are known, the device is idle before it: while the host
    takes these tokens in, schedules the step and launches it.
    """

    def __init__(self) -> None:
        self._begun = self._arrived = 0.0
        self._step, self._taking, self._launching = _Mean(), _Mean(), _Mean()

    def begin(self) -> float:
        """A step is scheduled from now on; return the time."""
        self._begun = time.perf_counter()
        return self._begun

    def launched(self) -> None:
        """The forward pass of the step is enqueued."""
        self._launching.add(time.perf_counter() - self._begun)

    def arrived(self, begun: float) -> None:
        """The tokens of a step have arrived, which was scheduled from ``begun`` on."""
        now = time.perf_counter()
        # It can't have begun on the device before the step ahead of it had ended.
        self._step.add(now - max(begun, self._arrived))
        self._arrived = now

    def taken(self) -> None:
        """The tokens are stored, and those that they force."""
        self._taking.add(time.perf_counter() - self._arrived)

    @property
    def idle_share(self) -> float:
        """The part of a step for which the device would be idle."""
        return (self._taking.value + self._launching.value) / (self._step.value or 1.0)


class _Mean:
    def __init__(self) -> None:
        self.value = 0.0

    def add(self, value: float) -> None:
        self.value += (value - self.value) * (_WEIGHT if self.value else 1.0)
