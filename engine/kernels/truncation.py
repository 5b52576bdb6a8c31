"""Truncation of the vocabulary by min-p, top-k and top-p: one threshold per row, without sorting.

The tokens that truncation keeps are always a set ``{logit >= threshold}``, so no masked copy of the logits is
needed. The kernel searches the threshold by value: each pass counts the tokens, or sums the probability,
above four pivots, and so narrows down the 32 bits of a float (16 for bfloat16 logits) by two bits. Sums run
in a fixed order per row, so the result does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.device import use_triton
from engine.kernels.launch import launch


def truncation_threshold(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Return the smallest logit of each row that may be sampled.

    Three filters apply in this order. min-p drops tokens less likely than ``min_p`` times the likeliest.
    top-k keeps the k likeliest of the rest. top-p keeps a token iff the renormalised probability of all
    strictly likelier tokens is less than ``top_p``. Tokens with equal logits are kept or dropped together;
    the likeliest is always kept.

    Args:
        logits: ``(N, V)`` of any float dtype, last dimension contiguous.
        temperature: ``(N,)`` float32; with 0 (greedy) the threshold is the row's maximum.
        top_k: ``(N,)`` int64; 0 keeps all.
        top_p, min_p: ``(N,)`` float32; 1 and 0 keep all.

    Returns:
        ``(N,)`` float32.
    """
    if use_triton(logits):
        return truncation_threshold_triton(logits, temperature, top_k, top_p, min_p)
    return truncation_threshold_reference(logits, temperature, top_k, top_p, min_p)


def truncation_threshold_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    x = logits.float().sort(dim=1, descending=True).values
    top = x[:, :1]
    temperature = temperature[:, None]
    floor = top + temperature * min_p[:, None].log()
    last = torch.where(top_k > 0, top_k, x.shape[1]).clamp(max=x.shape[1]) - 1
    floor = torch.maximum(torch.where(temperature == 0, top, floor), x.gather(1, last[:, None]))
    # For a row of -inf only, -inf - -inf would be NaN.
    scaled = (x - torch.where(top.isinf(), 0.0, top)) / torch.where(temperature == 0, 1.0, temperature)
    mass = torch.where(x >= floor, scaled.exp(), 0.0)
    above = mass.cumsum(dim=1) - mass
    kept = (x >= floor) & ((above < top_p[:, None] * mass.sum(dim=1, keepdim=True)) | (top_p >= 1)[:, None])
    kept[:, 0] = True
    return torch.where(kept, x, float("inf")).amin(dim=1)


@triton.jit
def _to_key(x, SHIFT: tl.constexpr):
    """Map float32 to int64, keeping the order; SHIFT 16 rounds down to bfloat16."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT).to(tl.int64)


@triton.jit
def _from_key(key, SHIFT: tl.constexpr):
    """Invert :func:`_to_key`."""
    key = key.to(tl.int32)
    # Keys of negative floats are complemented, so the bits shifted out were ones.
    key = tl.where(key < 0, (key << SHIFT) | ((1 << SHIFT) - 1), key << SHIFT)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weight_above(row, vocab, pivots, floor, top, scale, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Count the row's tokens >= floor strictly above each of the pivots ``(4,)``, or sum their weights.

    The weight of a token is ``exp((logit - top) / scale)``.
    """
    total = tl.zeros([BLOCK, 4], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        weight = tl.where((ids < vocab) & (x >= floor), 1.0, 0.0)
        if not BY_COUNT:
            weight *= tl.exp((x - top) / scale)
        total += tl.where(x[:, None] > pivots[None, :], weight[:, None], 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _search(
    row, vocab, limit, floor, top, scale, BY_COUNT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the least value in [floor, top] whose strictly greater tokens count, or weigh, less than
    ``limit``."""
    low = _to_key(floor, SHIFT)
    high = _to_key(top, SHIFT)
    # Invariant: high meets the condition, no value below low does.
    while low < high:
        step = (high - low + 3) // 4
        keys = tl.minimum(low + step * tl.arange(0, 4), high)
        pivots = _from_key(keys, SHIFT)
        met = _weight_above(row, vocab, pivots, floor, top, scale, BY_COUNT, BLOCK) < limit
        high = tl.minimum(high, tl.min(tl.where(met, keys, high), axis=0))
        low = tl.maximum(low, tl.max(tl.where(met, low, keys + 1), axis=0))
    # Rounding to bfloat16 may have moved the lower bound below the floor.
    return tl.maximum(_from_key(high, SHIFT), floor)


@triton.jit
def _threshold_kernel(
    logits, temperature, top_k, top_p, min_p, out,
    stride_logits, stride_temperature, stride_top_k, stride_top_p, stride_min_p,
    vocab, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride_logits
    temp = tl.load(temperature + index * stride_temperature)
    k = tl.load(top_k + index * stride_top_k)
    p = tl.load(top_p + index * stride_top_p)
    share = tl.load(min_p + index * stride_min_p)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most, x)
        least = tl.minimum(least, tl.where(x == float("-inf"), float("inf"), x))
    top = tl.max(most, axis=0)
    floor = tl.minimum(tl.min(least, axis=0), top)
    result = top
    if (temp != 0.0) & (top != float("-inf")):
        if share > 0.0:
            floor = tl.maximum(floor, top + temp * tl.log(share))
        if k > 0:
            # The result need not be a token's logit, but no token lies between it and the least logit kept.
            floor = _search(row, vocab, k.to(tl.float32), floor, top, temp, True, SHIFT, BLOCK)
        if p < 1.0:
            everything = tl.full([4], float("-inf"), tl.float32)
            mass = tl.max(_weight_above(row, vocab, everything, floor, top, temp, False, BLOCK), axis=0)
            floor = _search(row, vocab, p * mass, floor, top, temp, False, SHIFT, BLOCK)
        result = floor
    tl.store(out + index, result)


def truncation_threshold_triton(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch(
            _threshold_kernel, (rows,),
            logits=logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, out=out,
            stride_logits=logits.stride(0), stride_temperature=temperature.stride(0),
            stride_top_k=top_k.stride(0), stride_top_p=top_p.stride(0), stride_min_p=min_p.stride(0),
            vocab=vocab, SHIFT=16 if logits.dtype == torch.bfloat16 else 0,
            BLOCK=min(4096, triton.next_power_of_2(vocab)), num_warps=16,
        )  # fmt: skip
    return out
