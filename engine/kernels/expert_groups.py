"""The MLPs of a mixture of experts by grouped GEMMs: sorts pairs of tokens and experts, adds up the results."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl

from engine.kernels.experts import ExpertMatrices
from engine.kernels.fp8 import RoundedRows
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous

#: Pairs that a program looks at.
_SEGMENT = 4096


def group_by_expert_reference(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`group_by_expert_triton` in torch."""
    order = ids.flatten().argsort(stable=True)
    bounds = torch.arange(experts + 1, device=ids.device, dtype=torch.int32)
    return order.int(), torch.searchsorted(ids.flatten()[order], bounds).int()


def group_by_expert_triton(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs by expert; pairs of one expert keep their order.

    That takes no atomics, so the order is always the same.

    Args:
        ids: expert of each pair, ``(T, top_k)`` int32 contiguous.
        experts: number of experts.

    Returns:
        The pairs in their new order, ``(T * top_k,)`` int32, and where each expert's begin in it,
        ``(experts + 1,)`` int32, with their number at the end.
    """
    assert ids.is_contiguous() and ids.dtype == torch.int32
    pairs = ids.numel()
    segments = max(1, triton.cdiv(pairs, _SEGMENT))
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    bins = triton.next_power_of_2(experts)
    counts = starts
    if segments > 1:
        counts = torch.empty((segments, experts), dtype=torch.int32, device=ids.device)
        launch(
            _count_kernel, (segments,), ids_ptr=ids, counts_ptr=counts, pairs=pairs, experts=experts,
            SEGMENT=_SEGMENT, BINS=bins, num_warps=8,
        )  # fmt: skip
    launch(
        _group_kernel, (experts, segments), ids_ptr=ids, counts_ptr=counts, order_ptr=order, starts_ptr=starts,
        pairs=pairs, SEGMENT=_SEGMENT, BINS=bins, COUNTED=segments > 1, num_warps=8, **pdl_options(ids),
    )  # fmt: skip
    return order, starts


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(
    ids_ptr, counts_ptr, pairs, experts, SEGMENT: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """One program per segment of pairs: it counts those of each expert."""
    segment = tl.program_id(0)
    pair = segment * SEGMENT + tl.arange(0, SEGMENT)
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=0)
    counts = tl.histogram(ids, BINS, mask=pair < pairs)
    expert = tl.arange(0, BINS)
    tl.store(counts_ptr + segment * experts + expert, counts, mask=expert < experts)


@triton.jit(do_not_specialize=["pairs"])
def _group_kernel(
    ids_ptr, counts_ptr, order_ptr, starts_ptr, pairs, SEGMENT: tl.constexpr, BINS: tl.constexpr,
    COUNTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per expert and segment of pairs: it lists the expert's.

    Args:
        counts_ptr: ``(segments, experts)`` int32, pairs of each segment and expert, if COUNTED; otherwise there
            is one segment.
    """
    wait_for_previous(PDL)
    expert, segment = tl.program_id(0), tl.program_id(1)
    experts, segments = tl.num_programs(0), tl.num_programs(1)
    pair = segment * SEGMENT + tl.arange(0, SEGMENT)
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=2147483647)
    # The pairs of experts before this one, and this one's of the segments before.
    if COUNTED:
        other = tl.arange(0, BINS)[None, :]
        row = tl.arange(0, 16)[:, None]
        before = tl.zeros([16, BINS], tl.int32)
        for first in range(0, segments, 16):
            mask = (first + row < segments) & (other < expert + 1)
            counts = tl.load(
                counts_ptr + (first + row) * experts + other,
                mask=mask & ((other < expert) | (first + row < segment)),
                other=0,
            )
            before += counts
        place = tl.sum(before)
    else:
        place = tl.sum((ids < expert).to(tl.int32))
    if segment == 0:
        tl.store(starts_ptr + expert, place)
        if expert == experts - 1:
            tl.store(starts_ptr + experts, pairs)
    own = ids == expert
    tl.store(order_ptr + place + tl.cumsum(own.to(tl.int32), axis=0) - 1, pair, mask=own)


def add_up_experts(rows: torch.Tensor, top_k: int) -> torch.Tensor:
    """Add up the rows of a token's experts, in float32.

    Args:
        rows: of pairs, ``(T * top_k, H)`` contiguous.

    Returns:
        ``(T, H)`` in the dtype of ``rows``.
    """
    assert rows.is_contiguous()
    tokens, width = len(rows) // top_k, rows.shape[1]
    out = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)
    block = min(1024, triton.next_power_of_2(width))
    launch(
        _add_up_kernel, (triton.cdiv(width, block) * tokens,), rows_ptr=rows, out_ptr=out, width=width,
        TOP_K=top_k, BLOCK=block, num_warps=4, **pdl_options(out),
    )  # fmt: skip
    return out


@triton.jit
def _add_up_kernel(rows_ptr, out_ptr, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per token and block of columns."""
    wait_for_previous(PDL)
    blocks = tl.cdiv(width, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    mask = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for index in tl.static_range(TOP_K):
        row = rows_ptr + (token * TOP_K + index) * width
        total += tl.load(row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=mask)


class GroupedGemm(Protocol):
    """Multiplies the rows of each expert by its matrix."""

    def __call__(
        self,
        x: torch.Tensor | RoundedRows,
        matrices: ExpertMatrices,
        out: torch.Tensor | RoundedRows,
        order: torch.Tensor,
        starts: torch.Tensor,
        *,
        activation: str | None = None,
        factors: torch.Tensor | None = None,
        top_k: int = 1,
    ) -> None:
        """Write ``out``, a row for each pair.

        Args:
            x: rows of tokens with an activation; rows in sorted order without.
            out: rows in sorted order with an activation, which halves the outputs; rows of pairs, multiplied by
                ``factors``, without.
            order, starts: see :func:`group_by_expert_triton`.
        """


def experts_in_groups(
    gemm: GroupedGemm,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    activation: str,
    *,
    rounded: int | None = None,
) -> torch.Tensor:
    """Compute :func:`engine.kernels.dispatch.chosen_experts` by two grouped GEMMs.

    Args:
        rounded: have the first one round its results to fp8 in so many groups.
    """
    top_k = ids.shape[1]
    assert x.stride(1) == 1 and weights.is_contiguous()
    order, starts = group_by_expert_triton(ids, len(gate_up.weight))
    pairs = ids.numel()
    inner: torch.Tensor | RoundedRows
    if rounded is None:
        inner = torch.empty((pairs, down.inputs), dtype=x.dtype, device=x.device)
    else:
        inner = RoundedRows.empty(pairs, down.inputs, x.device, rounded)
    gemm(x, gate_up, inner, order, starts, activation=activation, top_k=top_k)
    out = torch.empty((pairs, x.shape[1]), dtype=x.dtype, device=x.device)
    gemm(inner, down, out, order, starts, factors=weights)
    return add_up_experts(out, top_k)
