"""How an attention kernel cuts up a problem."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows and keys per tile, and how the compiler schedules them."""

    rows: int
    keys: int
    warps: int
    stages: int
