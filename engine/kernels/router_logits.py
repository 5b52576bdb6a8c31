"""The logits of a router of experts: a GEMM of bfloat16 rows by a float32 weight, to the precision of float32.

Tensor cores multiply two bfloat16 numbers exactly. A float32 number is the sum of three of them, so three products
take the place of one in float32, for which there is no tensor core. They add up with fewer bits than float32 has
(H200: errors of 7e-6 over 2048 inputs), so their sums over a tile are added up outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch

#: With fewer tokens torch's GEMM in float32 is as fast.
MIN_TOKENS = 2048
_TILE_TOKENS, _TILE_EXPERTS, _TILE_INPUTS = 64, 128, 64


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute ``x @ weight.T`` in float32.

    Args:
        x: ``(T, H)``, last dimension contiguous.
        weight: ``(E, H)`` float32 contiguous.

    Returns:
        ``(T, E)`` float32 contiguous.
    """
    run = use_triton(x) and x.dtype == torch.bfloat16 and len(x) >= MIN_TOKENS
    return (router_logits_triton if run else router_logits_reference)(x, weight)


def router_logits_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), weight)


def router_logits_triton(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (tokens, size), experts = x.shape, len(weight)
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == size
    out = torch.empty((tokens, experts), dtype=torch.float32, device=x.device)
    if tokens:
        launch(
            _router_logits_kernel, (triton.cdiv(tokens, _TILE_TOKENS), triton.cdiv(experts, _TILE_EXPERTS)),
            x_ptr=x, weight_ptr=weight, out_ptr=out, tokens=tokens, size=size, experts=experts,
            x_stride=x.stride(0), SPLIT=x.dtype == torch.bfloat16, EVEN=size % _TILE_INPUTS == 0,
            TOKENS=_TILE_TOKENS, EXPERTS=_TILE_EXPERTS, INPUTS=_TILE_INPUTS, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _router_logits_kernel(
    x_ptr, weight_ptr, out_ptr, tokens, size, experts, x_stride,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens and of experts; weights are the left operand, which registers may hold.

    SPLIT: multiply three bfloat16 parts of each weight.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    lane = tl.arange(0, INPUTS)
    # Lanes beyond the last token or expert load the last one again; their results are not stored.
    xs = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride + lane[:, None]
    weights = weight_ptr + tl.minimum(expert, experts - 1)[:, None] * size + lane[None, :]
    acc = tl.zeros([EXPERTS, TOKENS], tl.float32)
    for k in range(0, size, INPUTS):
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
    tl.store(out_ptr + token.to(tl.int64)[None, :] * experts + expert[:, None], acc, mask=mask)
