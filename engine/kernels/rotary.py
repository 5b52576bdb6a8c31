"""Rotary position embedding in place: one axis, or three (M-RoPE)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton
from engine.kernels.launch import launch
from engine.kernels.overlap import overlap, wait_for_previous


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    mrope_section: tuple[int, ...] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    """Rotate ``q`` and ``k`` by their tokens' positions, halves against each other (NeoX convention).

    As in Transformers, cos and sin are rounded to the tensors' dtype before the products.

    Args:
        q, k: ``(T, Hq, D)`` and ``(T, Hkv, D)``, changed in place; strided views with a contiguous last
            dimension, e.g. parts of one fused projection.
        positions: ``(T,)``, or ``(3, T)`` for axes t, h, w; int64.
        cos, sin: float32 ``(P, R / 2)`` by position; ``R <= D`` leading dimensions are rotated.
        mrope_section: angles that belong to each axis, summing to ``R / 2``; required iff positions have axes.
        mrope_interleaved: angle ``i`` belongs to axis ``i % 3`` as far as sections reach, the rest to t
            (Qwen3-VL), instead of consecutive pieces (Qwen2-VL).
    """
    assert (positions.dim() == 2) == (mrope_section is not None), "sections and axes come together"
    run = rotary_triton if use_triton(q) else rotary_reference
    run(q, k, positions, cos, sin, mrope_section=mrope_section, mrope_interleaved=mrope_interleaved)


def rotary_reference(q, k, positions, cos, sin, *, mrope_section=None, mrope_interleaved=False) -> None:
    if mrope_section is not None:
        axis = angle_axes(mrope_section, mrope_interleaved).to(positions.device)
        angle = torch.arange(len(axis), device=positions.device)
        # (T, R / 2): the position along each angle's own axis.
        along = positions[axis].T
        cos, sin = cos[along, angle], sin[along, angle]
    else:
        cos, sin = cos[positions], sin[positions]
    half = cos.shape[-1]
    for x in (q, k):
        c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        first, second = x[..., :half].clone(), x[..., half : 2 * half].clone()
        x[..., :half] = first * c + -second * s
        x[..., half : 2 * half] = second * c + first * s


def angle_axes(section: tuple[int, ...], interleaved: bool) -> torch.Tensor:
    """int64 ``(R / 2,)``: the axis that each angle takes its position from."""
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    axes = torch.zeros(sum(section), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def rotary_triton(q, k, positions, cos, sin, *, mrope_section=None, mrope_interleaved=False) -> None:
    tokens, q_heads, _ = q.shape
    assert q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
    if tokens == 0:
        return
    section = mrope_section or (0, 0, 0)
    half = cos.shape[-1]
    axis_stride = positions.stride(0) if mrope_section is not None else 0
    launch(
        _rotary_kernel,
        (tokens,),
        q,
        k,
        positions,
        cos,
        sin,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        axis_stride,
        positions.stride(-1),
        cos.stride(0),
        Q_HEADS=q_heads,
        K_HEADS=k.shape[1],
        HALF=half,
        SECTION_T=section[0],
        SECTION_H=section[1],
        SECTION_W=section[2],
        MROPE=mrope_section is not None,
        INTERLEAVED=mrope_interleaved,
        Q_HEADS_PAD=triton.next_power_of_2(q_heads),
        K_HEADS_PAD=triton.next_power_of_2(k.shape[1]),
        HALF_PAD=triton.next_power_of_2(half),
        num_warps=4,
        **overlap(q),
    )


@triton.jit
def load_angles(
    positions_ptr,
    cos_ptr,
    sin_ptr,
    token,
    axis_stride,
    position_stride,
    table_stride,
    angle,
    mask,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    MROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """float32 cos and sin of one token for each ``angle``, by the angle's own axis; 0 outside of ``mask``."""
    axis = tl.zeros_like(angle).to(tl.int64)
    if MROPE:
        if INTERLEAVED:
            height = (angle % 3 == 1) & (angle < 3 * SECTION_H)
            width = (angle % 3 == 2) & (angle < 3 * SECTION_W)
        else:
            height = (angle >= SECTION_T) & (angle < SECTION_T + SECTION_H)
            width = angle >= SECTION_T + SECTION_H
        axis = tl.where(height, 1, tl.where(width, 2, 0)).to(tl.int64)
    position = tl.load(positions_ptr + axis * axis_stride + token * position_stride)
    cos = tl.load(cos_ptr + position * table_stride + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position * table_stride + angle, mask=mask, other=0.0)
    return cos, sin


# Positions along several axes lie as far apart as there are tokens.
@triton.jit(do_not_specialize=["axis_stride"])
def _rotary_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    axis_stride,
    position_stride,
    table_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    MROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_HEADS_PAD: tl.constexpr,
    K_HEADS_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    angle = tl.arange(0, HALF_PAD)
    cos, sin = load_angles(
        positions_ptr,
        cos_ptr,
        sin_ptr,
        token,
        axis_stride,
        position_stride,
        table_stride,
        angle,
        angle < HALF,
        SECTION_T,
        SECTION_H,
        SECTION_W,
        MROPE,
        INTERLEAVED,
    )
    q_row, k_row = q_ptr + token * q_token, k_ptr + token * k_token
    rotate_heads(q_row, q_head, q_row, q_head, cos, sin, Q_HEADS, HALF, Q_HEADS_PAD, HALF_PAD)
    rotate_heads(k_row, k_head, k_row, k_head, cos, sin, K_HEADS, HALF, K_HEADS_PAD, HALF_PAD)


@triton.jit
def rotate_heads(
    row_ptr,
    head_stride,
    out_ptr,
    out_stride,
    cos,
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Rotate all heads of one token, in place where ``out_ptr`` is ``row_ptr``."""
    dtype = row_ptr.dtype.element_ty
    c = cos[None, :].to(dtype).to(tl.float32)
    s = sin[None, :].to(dtype).to(tl.float32)
    head = tl.arange(0, HEADS_PAD)[:, None]
    angle = tl.arange(0, HALF_PAD)[None, :]
    mask = (head < HEADS) & (angle < HALF)
    place = row_ptr + head * head_stride + angle
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    # Products and sums are rounded where torch rounds them.
    low = (first * c).to(dtype).to(tl.float32) - (second * s).to(dtype).to(tl.float32)
    high = (second * c).to(dtype).to(tl.float32) + (first * s).to(dtype).to(tl.float32)
    target = out_ptr + head * out_stride + angle
    tl.store(target, low.to(dtype), mask=mask)
    tl.store(target + HALF, high.to(dtype), mask=mask)
