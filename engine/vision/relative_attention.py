"""Attention within square grids, with scores that depend on how far apart a query and a key are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Scores of grids that are computed together: each takes as many numbers as it has pairs of patches.
_SCORES = 1 << 28


def relative_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of each token over all tokens of its grid, which lie row by row.

    The score of a query ``q`` and a key ``k`` is ``scale * (q · k) + q · down + q · along``, with the vectors
    of their places in rows and in columns (https://arxiv.org/abs/2112.01526, section 4.1).

    Args:
        q, k, v: ``(grids, side², heads, head_dim)``.
        tables: ``down`` and ``along``, each ``(side, side, head_dim)`` by the place of the query and of the
            key; None adds nothing.

    Returns:
        ``(grids, side², heads, head_dim)``.
    """
    together = max(1, _SCORES // (q.shape[1] ** 2 * q.shape[2]))
    outputs = [
        F.scaled_dot_product_attention(
            queries, keys, values, None if tables is None else _bias(queries, *tables), scale=scale
        )
        for queries, keys, values in zip(*(x.transpose(1, 2).split(together) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(outputs).transpose(1, 2)


def _bias(q: torch.Tensor, down: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of ``q`` ``(grids, heads, side², head_dim)``: ``(..., side², side²)``."""
    grid = q.unflatten(2, (len(down), len(down)))
    rows = torch.einsum("bhijc,ikc->bhijk", grid, down)
    columns = torch.einsum("bhijc,jkc->bhijk", grid, along)
    return (rows[..., :, None] + columns[..., None, :]).flatten(2, 3).flatten(3, 4)
