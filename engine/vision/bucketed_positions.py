"""Learned positions of towers that take pictures of any size."""

from __future__ import annotations

import torch


def bucketed_positions(
    height: int, width: int, table_side: int, *, round_products: bool = True
) -> torch.Tensor:
    """Rows of a table of ``table_side²`` positions for a picture of ``height`` by ``width`` patches: int64
    ``(height * width,)`` on the CPU, row by row.

    A patch's fraction of the way along each side picks one of ``table_side`` buckets. Which side of a bound a
    fraction falls on depends on how it is rounded, so fractions and bounds are computed as the families do
    that were trained with them; exact ones would pick other buckets for some sizes, 25 by 25 of 25 for one.

    Args:
        round_products: multiples of the float32 step are rounded to float32 each, as in Idefics3; otherwise
            they are the terms of a float32 range, as in MiniCPM-V 2.6.
    """
    bounds = torch.arange(1 / table_side, 1.0, 1 / table_side)
    down, along = (_buckets(count, bounds, round_products) for count in (height, width))
    return (down[:, None] * table_side + along).flatten()


def _buckets(count: int, bounds: torch.Tensor, round_products: bool) -> torch.Tensor:
    step = 1.0 / torch.tensor(count)
    if round_products:
        fractions = (torch.arange(count, dtype=torch.float32) * step).clamp(max=1.0 - 1e-6)
    else:
        fractions = torch.arange(0, 1 - 1e-6, float(step))
    return torch.bucketize(fractions, bounds, right=True)
