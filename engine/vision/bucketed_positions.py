"""Learned positions of towers that take images of any size."""

from __future__ import annotations

import torch


def bucketed_positions(
    height: int, width: int, table_side: int, *, round_products: bool = True
) -> torch.Tensor:
    """Rows of a table of ``table_side²`` positions for an image of ``height`` by ``width`` patches: int64
    ``(height * width,)`` on the CPU, row by row.

    A patch's place, as a fraction of each side, selects one of ``table_side`` buckets. Rounding decides the
    bucket of a fraction that lies on a bound. So fractions and bounds are computed as in the published
    models. Exact arithmetic would select other buckets for some sizes, e.g. 25 patches with a table of 25.

    Args:
        round_products: whether fractions are float32 products of an index and a float32 step, as in Idefics3;
            else they are the terms of a float32 range, as in MiniCPM-V.
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
