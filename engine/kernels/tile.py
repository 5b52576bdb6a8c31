"""Tiles of attention kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Part of an attention problem that a program works on at a time, and how the kernel is compiled.

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
