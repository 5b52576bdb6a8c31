"""The logits of a router of experts: a GEMM of 16-bit rows by a float32 weight, exact to float32.

A bfloat16 tensor core multiplies two numbers exactly and adds up in float32. A float32 number is the sum of three
of bfloat16, so three products take the place of one in float32, which has no tensor core.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous

#: From this many tokens on tiles are large: there are enough of them, and the weight is read by fewer programs.
_MANY_TOKENS = 2048


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
    many = tokens >= _MANY_TOKENS
    rows, outputs, warps = (64, 128, 8) if many else (16, 64, 4)
    width = min(64 if many else 128, max(16, triton.next_power_of_2(size)))
    if tokens:
        launch(
            _router_logits_kernel, (triton.cdiv(tokens, rows), triton.cdiv(experts, outputs)),
            x_ptr=x, weight_ptr=weight, out_ptr=out, tokens=tokens, size=size, experts=experts,
            x_stride=x.stride(0), SPLIT=x.dtype == torch.bfloat16, EVEN=size % width == 0, ROWS=rows,
            OUTPUTS=outputs, WIDTH=width, num_warps=warps, num_stages=3, **pdl_options(x),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _router_logits_kernel(
    x_ptr, weight_ptr, out_ptr, tokens, size, experts, x_stride,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens and of experts; weights are the left operand, which registers may hold.

    SPLIT: multiply three bfloat16 parts of each weight.
    """
    wait_for_previous(PDL)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    lane = tl.arange(0, WIDTH)
    # Lanes beyond the last token or expert load the last one again; their results are not stored.
    xs = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride + lane[:, None]
    weights = weight_ptr + tl.minimum(expert, experts - 1)[:, None] * size + lane[None, :]
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for k in range(0, size, WIDTH):
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
            acc = tl.dot(low, x, acc)
            acc = tl.dot(middle, x, acc)
            acc = tl.dot(high, x, acc)
        else:
            acc = tl.dot(weight, x.to(tl.float32), acc, input_precision="ieee")
    mask = (expert < experts)[:, None] & (token < tokens)[None, :]
    tl.store(out_ptr + token.to(tl.int64)[None, :] * experts + expert[:, None], acc, mask=mask)
