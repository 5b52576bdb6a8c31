"""Learned positions of towers that take pictures of any size."""

from __future__ import annotations

import torch


def bucketed_positions(height: int, width: int, table_side: int) -> torch.Tensor:
    """Rows of a table of ``table_side²`` positions for a picture of ``height`` by ``width`` patches: int64
    ``(height * width,)`` on the CPU, row by row.

    A patch's fraction of the way along each side picks one of ``table_side`` buckets. Fractions and bounds
    are those of Transformers' Idefics3, rounded in float32 as there: exact fractions would pick other buckets
    for some sizes, 25 by 25 of 25 for one.
    """
    bounds = torch.arange(1 / table_side, 1.0, 1 / table_side)
    down, along = (_buckets(count, bounds) for count in (height, width))
    return (down[:, None] * table_side + along).flatten()


def _buckets(count: int, bounds: torch.Tensor) -> torch.Tensor:
    fractions = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
    return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), bounds, right=True)
