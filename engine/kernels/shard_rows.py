"""Rows of a table that is split over ranks, in one launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous

_BLOCK = 1024


def shard_rows(table: torch.Tensor, ids: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Look up rows of which another rank may have the table; zeros for these, so the ranks' sum is right.

    Args:
        table: ``(R, W)`` contiguous, of which the first ``count`` rows are those of the ids from ``start`` on.
        ids: int64 ``(T,)``.

    Returns:
        ``(T, W)`` in the dtype of ``table``.
    """
    return (shard_rows_triton if use_triton(ids) else shard_rows_reference)(table, ids, start, count)


def shard_rows_reference(table: torch.Tensor, ids: torch.Tensor, start: int, count: int) -> torch.Tensor:
    local = ids - start
    own = (local >= 0) & (local < count)
    return F.embedding(local.where(own, 0), table) * own[:, None]


def shard_rows_triton(table: torch.Tensor, ids: torch.Tensor, start: int, count: int) -> torch.Tensor:
    width = table.shape[1]
    assert table.is_contiguous()
    ids = ids.contiguous()
    out = torch.empty((len(ids), width), dtype=table.dtype, device=table.device)
    if len(ids):
        launch(
            _shard_rows_kernel, (len(ids), triton.cdiv(width, _BLOCK)),
            table_ptr=table, ids_ptr=ids, out_ptr=out, start=start, count=count, width=width,
            BLOCK=_BLOCK, num_warps=4, **pdl_options(out),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["start", "count"])
def _shard_rows_kernel(
    table_ptr, ids_ptr, out_ptr, start, count, width, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    local = tl.load(ids_ptr + row) - start
    own = (local >= 0) & (local < count)
    values = tl.load(table_ptr + local * width + column, mask=column < tl.where(own, width, 0), other=0.0)
    tl.store(out_ptr + row * width + column, values, mask=column < width)
