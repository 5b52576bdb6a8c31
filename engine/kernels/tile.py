"""The tile of an attention kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """How much of the problem a program works on at a time, and how it is compiled.

    Attributes:
        rows: rows of queries.
        keys: keys per step.
        warps: warps of a program.
        stages: depth of the compiler's software pipeline over tiles of keys.
        splits: programs that share the keys of the same rows (flash-decoding).
    """

    rows: int
    keys: int
    warps: int
    stages: int
    splits: int = 1
