"""Random choices of a drawn case: named, repeatable, and independent of each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Draw:
    """The choices of one case.

    Each name has a random stream of its own. A choice that is added, or a variation that is switched off,
    does not change the other choices, so a case can be made simpler one variation at a time.

    Args:
        family: name of the family of models.
        seed: number of the case.
        without: variations that are switched off.
        coarse: weights are rounded to bfloat16, and sizes are those that GPU kernels take.

    Attributes:
        varied: the variations that this case has, in the order in which they were drawn.
    """

    def __init__(self, family: str, seed: int, without: Sequence[str] = (), coarse: bool = False) -> None:
        self.family, self.seed, self.without = family, seed, frozenset(without)
        self.coarse = coarse
        self.varied: list[str] = []

    def stream(self, name: str) -> random.Random:
        """The random numbers of ``name``."""
        return random.Random(f"{self.family}|{self.seed}|{name}")

    def choice(self, name: str, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of ``options``."""
        return self.stream(name).choices(options, weights)[0]

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return self.stream(name).randint(low, high)

    def number(self, name: str, low: float, high: float) -> float:
        """A number between ``low`` and ``high`` with few digits."""
        return round(self.stream(name).uniform(low, high), 3)

    def varies(self, name: str, chance: float) -> bool:
        """Return whether the case has the variation ``name``, a departure from the plain case."""
        if name in self.without or self.stream(name).random() >= chance:
            return False
        if name not in self.varied:
            self.varied.append(name)
        return True

    def variant(self, name: str, options: Sequence[T], chance: float = 0.5) -> T:
        """The first of ``options``, which is the plain one, or else one of the others, as a variation."""
        if len(options) < 2 or not self.varies(name, chance):
            return options[0]
        return self.stream(name + " which").choice(list(options[1:]))

    def spelled(self, fields: dict[str, Any], *names: str) -> None:
        """Leave some of the fields ``names`` out, so that a reader takes its own defaults."""
        for name in names:
            if name in fields and self.varies(f"{name} absent", 0.12):
                del fields[name]
