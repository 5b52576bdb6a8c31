"""Learned positions of towers that take images of any size."""

from __future__ import annotations

from typing import Literal

import torch

Fractions = Literal["products", "range", "quotients"]


def bucketed_positions(
    height: int, width: int, table_side: int, *, fractions: Fractions = "products"
) -> torch.Tensor:
    """Rows of a table of ``table_side²`` positions for an image of ``height`` by ``width`` patches: int64
    ``(height * width,)`` on the CPU, row by row.

    A patch's place, as a fraction of each side, selects one of ``table_side`` buckets. Rounding decides the
    bucket of a fraction that lies on a bound. So fractions and bounds are computed as in the published
    models. Exact arithmetic would select other buckets for some sizes, e.g. 25 patches with a table of 25.

    Args:
        fractions: float32 products of an index and a float32 step, as in Idefics3; the terms of a float32
            range, as in MiniCPM-V 2.6; or float32 quotients, as in MiniCPM-V 4.6.
    """
    bounds = torch.arange(1 / table_side, 1.0, 1 / table_side)
    down, along = (_buckets(count, bounds, fractions) for count in (height, width))
    return (down[:, None] * table_side + along).flatten()


def _buckets(count: int, bounds: torch.Tensor, fractions: Fractions) -> torch.Tensor:
    step, index = 1.0 / torch.tensor(count), torch.arange(count, dtype=torch.float32)
    if fractions == "products":
        found = (index * step).clamp(max=1.0 - 1e-6)
    elif fractions == "range":
        found = torch.arange(0, 1 - 1e-6, float(step))
    else:
        found = index / count
    return torch.bucketize(found, bounds, right=True)
