"""The logits of a router of experts: a GEMM of bfloat16 rows by a float32 weight, to the precision of float32.

Tensor cores multiply two bfloat16 numbers exactly. A float32 number is the sum of three of them, so three products
take the place of one in float32, for which there is no tensor core. They add up with fewer bits than float32 has
(H200: errors of 7e-6 over 2048 inputs), so their sums over a tile are added up outside. With few tokens the inputs
are split over programs, and a second launch adds up their sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import num_sms, use_triton
from engine.kernels.launch import is_compiling, launch
from engine.kernels.pdl import pdl_options, wait_for_previous

_TILE_TOKENS, _TILE_EXPERTS, _TILE_INPUTS = 64, 128, 64
_MAX_SPLITS = 32
#: Sums that a program adds up.
_SUMS = 128


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute ``x @ weight.T`` in float32.

    Args:
        x: ``(T, H)``, last dimension contiguous.
        weight: ``(E, H)`` float32 contiguous.

    Returns:
        ``(T, E)`` float32 contiguous.
    """
    run = use_triton(x) and x.dtype == torch.bfloat16
    return (router_logits_triton if run else router_logits_reference)(x, weight)


def router_logits_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), weight)


def router_logits_triton(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (tokens, size), experts = x.shape, len(weight)
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == size
    out = torch.empty((tokens, experts), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return out
    tiles = triton.cdiv(tokens, _TILE_TOKENS), triton.cdiv(experts, _TILE_EXPERTS)
    steps = triton.cdiv(size, _TILE_INPUTS)
    share = triton.cdiv(steps, choose_splits(tiles[0] * tiles[1], num_sms(x.device)))
    splits = triton.cdiv(steps, share)
    parts = out
    if splits > 1:
        parts = torch.empty((splits, tokens, experts), dtype=torch.float32, device=x.device)
    options = pdl_options(x)
    launch(
        _router_logits_kernel, (*tiles, splits), x_ptr=x, weight_ptr=weight, out_ptr=parts, tokens=tokens,
        size=size, experts=experts, x_stride=x.stride(0), share=share * _TILE_INPUTS,
        SPLIT=x.dtype == torch.bfloat16, EVEN=size % _TILE_INPUTS == 0, TOKENS=_TILE_TOKENS,
        EXPERTS=_TILE_EXPERTS, INPUTS=_TILE_INPUTS, num_warps=8, num_stages=3, **options,
    )  # fmt: skip
    # When compiling ahead of time, compile the kernel for fewer tokens too.
    if splits > 1 or is_compiling():
        launch(
            _add_parts_kernel, (triton.cdiv(out.numel(), _SUMS),), parts_ptr=parts, out_ptr=out, numbers=out.numel(),
            parts=splits, PARTS=_MAX_SPLITS, BLOCK=_SUMS, num_warps=1, **options,
        )  # fmt: skip
    return out


def choose_splits(tiles: int, sms: int) -> int:
    """Return over how many programs the inputs of a tile are split: all programs run at a time."""
    return max(1, min(_MAX_SPLITS, sms // tiles))


@triton.jit(do_not_specialize=["tokens", "share"])
def _router_logits_kernel(
    x_ptr, weight_ptr, out_ptr, tokens, size, experts, x_stride, share, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens and of experts and ``share`` of inputs; weights are the left operand, which
    registers may hold.

    SPLIT: multiply three bfloat16 parts of each weight.
    """
    wait_for_previous(PDL)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    lane = tl.arange(0, INPUTS)
    # Lanes beyond the last token or expert load the last one again; their results are not stored.
    xs = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride + lane[:, None]
    weights = weight_ptr + tl.minimum(expert, experts - 1)[:, None] * size + lane[None, :]
    acc = tl.zeros([EXPERTS, TOKENS], tl.float32)
    begin = tl.program_id(2) * share
    for k in range(begin, tl.minimum(begin + share, size), INPUTS):
        if EVEN:
            x = tl.load(xs + k)
            weight = tl.load(weights + k)
        else:
            x = tl.load(xs + k, mask=(k + lane < size)[:, None], other=0.0)
            weight = tl.load(weights + k, mask=(k + lane < size)[None, :], other=0.0)
        if SPLIT:
            high = weight.to(tl.bfloat16)
            rest = weight - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc += tl.dot(high, x, tl.dot(middle, x, tl.dot(low, x)))
        else:
            acc += tl.dot(weight, x.to(tl.float32), input_precision="ieee")
    mask = (expert < experts)[:, None] & (token < tokens)[None, :]
    row = tl.program_id(2).to(tl.int64) * tokens + token
    tl.store(out_ptr + row[None, :] * experts + expert[:, None], acc, mask=mask)


@triton.jit(do_not_specialize=["numbers", "parts"])
def _add_parts_kernel(
    parts_ptr, out_ptr, numbers, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program per block of sums of ``parts`` numbers, at most PARTS, all of which it loads at once."""
    wait_for_previous(PDL)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)[:, None]
    mask = (part < parts) & (number < numbers)[None, :]
    found = tl.load(parts_ptr + part.to(tl.int64) * numbers + number[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + number, tl.sum(found, axis=0), mask=number < numbers)
