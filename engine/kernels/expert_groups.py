"""Sorts the pairs of tokens and experts by expert, on the device, for a grouped GEMM."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import launch

#: Pairs that a program looks at in a step.
_STEP = 4096


def group_by_expert_reference(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`group_by_expert_triton` in torch."""
    order = ids.flatten().argsort(stable=True)
    bounds = torch.arange(experts + 1, device=ids.device, dtype=torch.int32)
    return order.int(), torch.searchsorted(ids.flatten()[order], bounds).int()


def group_by_expert_triton(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs by expert; pairs of one expert keep their order.

    Args:
        ids: expert of each pair, ``(T, top_k)`` int32 contiguous.
        experts: number of experts.

    Returns:
        The pairs in their new order, ``(T * top_k,)`` int32, and where each expert's begin in it,
        ``(experts + 1,)`` int32, with their number at the end.
    """
    assert ids.is_contiguous() and ids.dtype == torch.int32
    order = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    launch(
        _group_kernel, (experts,), ids_ptr=ids, order_ptr=order, starts_ptr=starts, pairs=ids.numel(),
        STEP=_STEP, num_warps=8,
    )  # fmt: skip
    return order, starts


@triton.jit(do_not_specialize=["pairs"])
def _group_kernel(ids_ptr, order_ptr, starts_ptr, pairs, STEP: tl.constexpr):
    """One program per expert. It reads all ids twice: to count the pairs before its own, then to list these.

    That takes no atomics, so the order is always the same.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, STEP)
    before = tl.zeros([STEP], tl.int32)
    for first in range(0, pairs, STEP):
        ids = tl.load(ids_ptr + first + lane, mask=first + lane < pairs, other=expert)
        before += (ids < expert).to(tl.int32)
    place = tl.sum(before)
    tl.store(starts_ptr + expert, place)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts_ptr + expert + 1, pairs)
    for first in range(0, pairs, STEP):
        pair = first + lane
        own = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) == expert
        count = own.to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(count, axis=0) - 1, pair, mask=own)
        place += tl.sum(count)
