"""Rotary position embedding in place, with positions along one axis or several (M-RoPE)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.rms_norm import scaled_by_norm


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines of a model's rotary embedding; built once.

    Attributes:
        cos, sin: ``(P, R / 2)`` float32 by position, last dimension contiguous. The first ``R`` dimensions of
            a head are rotated.
        section: M-RoPE: how many angles take their position from each axis; they sum to ``R / 2``. There are
            three axes, t, h and w, or four (Hunyuan). None: positions have one axis.
        interleaved: how many axes take turns up to their sections' lengths, before angles that take axis t: 3
            of t, h and w (Qwen3-VL), 2 of h and w (Ernie 4.5 VL); 0 for consecutive pieces (Qwen2-VL).
        adjacent: neighbouring dimensions of a head rotate against each other (GPT-J convention, GLM), instead
            of its two halves (NeoX convention).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    section: tuple[int, ...] | None = None
    interleaved: int = 0
    adjacent: bool = False

    def __post_init__(self) -> None:
        assert self.cos.stride(-1) == self.sin.stride(-1) == 1 and self.cos.stride(0) == self.sin.stride(0)

    def section_of(self, positions: torch.Tensor) -> tuple[int, ...] | None:
        """Return the section for positions ``(axes, T)``, None for positions ``(T,)``."""
        if positions.dim() == 1:
            return None
        assert self.section is not None, "positions along several axes need sections"
        return self.section

    def arguments(self, positions: torch.Tensor) -> dict[str, Any]:
        """Return the arguments that a kernel needs to call :func:`load_angles`, by name."""
        section = self.section_of(positions)
        return {
            "positions_ptr": positions, "cos_ptr": self.cos, "sin_ptr": self.sin,
            "axis_stride": 0 if section is None else positions.stride(0),
            "position_stride": positions.stride(-1), "angle_stride": self.cos.stride(0),
            "HALF": self.cos.shape[1], "SECTION": section, "INTERLEAVED": self.interleaved,
            "ADJACENT": self.adjacent,
        }  # fmt: skip


def not_rotated(q: torch.Tensor) -> dict[str, Any]:
    """Return what :meth:`RotaryTable.arguments` does, for a kernel that rotates nothing. ``q`` stands in for what is
    not accessed."""
    return {
        "positions_ptr": q, "cos_ptr": q, "sin_ptr": q, "axis_stride": 0, "position_stride": 0, "angle_stride": 0,
        "HALF": 0, "SECTION": None, "INTERLEAVED": 0, "ADJACENT": False,
    }  # fmt: skip


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> None:
    """Rotate ``q`` and ``k`` in place by their tokens' positions.

    Cos and sin are rounded to the dtype of ``q`` before the multiplication, as Transformers does for most
    decoders. Ernie 4.5 and the towers of Qwen, GLM and PaddleOCR it rotates in float32: here cos and sin are
    rounded for these, too.

    Args:
        q, k: ``(T, Hq, D)`` and ``(T, Hkv, D)``; may be strided views with a contiguous last dimension, e.g.
            parts of a fused projection.
        positions: ``(T,)``, or ``(axes, T)`` if the table has sections; int64.
    """
    run = rotary_triton if use_triton(q) else rotary_reference
    run(q, k, positions, table)


def rotary_reference(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> None:
    section = table.section_of(positions)
    if section is not None:
        axis = angle_axes(section, table.interleaved).to(positions.device)
        # (T, R / 2): each angle's position along its own axis.
        along = positions[axis].T
        cos, sin = table.cos.gather(0, along), table.sin.gather(0, along)
    else:
        cos, sin = table.cos[positions], table.sin[positions]
    half = cos.shape[-1]
    for x in (q, k):
        c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        step, end = (2, 2 * half) if table.adjacent else (1, half)
        first, second = x[..., :end:step], x[..., (1 if table.adjacent else half) : 2 * half : step]
        turned = first * c - second * s
        second.mul_(c).add_(first * s)
        first.copy_(turned)


@cache
def angle_axes(section: tuple[int, ...], interleaved: int) -> torch.Tensor:
    """Return the axis that each angle takes its position from, int64 ``(R / 2,)``; not to be changed."""
    if not interleaved:
        return torch.repeat_interleave(torch.arange(len(section)), torch.tensor(section))
    axes = torch.zeros(sum(section), dtype=torch.int64)
    for axis in (1, 2):
        axes[interleaved - 3 + axis : interleaved * section[axis] : interleaved] = axis
    return axes


def rotary_triton(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> None:
    assert q.stride(-1) == k.stride(-1) == 1
    if q.shape[0] == 0:
        return
    launch(
        _rotary_kernel, (q.shape[0],),
        q_ptr=q, k_ptr=k, **table.arguments(positions),
        q_token=q.stride(0), q_head=q.stride(1), k_token=k.stride(0), k_head=k.stride(1),
        Q_HEADS=q.shape[1], K_HEADS=k.shape[1], num_warps=4, **pdl_options(q),
    )  # fmt: skip


@triton.jit
def load_angles(
    positions_ptr, cos_ptr, sin_ptr, token, axis_stride, position_stride, angle_stride, angle, mask,
    SECTION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load the cosine and sine of each ``angle`` at one token's position, float32; 0 outside of ``mask``."""
    if SECTION is None:
        position = tl.load(positions_ptr + token * position_stride)
    else:
        if INTERLEAVED:
            height = (angle % INTERLEAVED == INTERLEAVED - 2) & (angle < INTERLEAVED * SECTION[1])
            width = (angle % INTERLEAVED == INTERLEAVED - 1) & (angle < INTERLEAVED * SECTION[2])
        else:
            height = (angle >= SECTION[0]) & (angle < SECTION[0] + SECTION[1])
            width = angle >= SECTION[0] + SECTION[1]
        axis = tl.where(height, 1, tl.where(width, 2, 0)).to(tl.int64)
        if len(SECTION) == 4:
            axis += angle >= SECTION[0] + SECTION[1] + SECTION[2]
        position = tl.load(positions_ptr + axis * axis_stride + token * position_stride)
    cos = tl.load(cos_ptr + position * angle_stride + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position * angle_stride + angle, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def load_rotation(
    column, positions_ptr, cos_ptr, sin_ptr, token, axis_stride, position_stride, angle_stride, dtype: tl.constexpr,
    HALF: tl.constexpr, SECTION: tl.constexpr, INTERLEAVED: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Return what :func:`rotated` needs for the dimensions ``column`` of a token's heads of ``dtype``: cosines, sines
    with their signs, float32, and the other dimensions of their pairs."""
    in_pair = column < 2 * HALF
    cos, sin = load_angles(
        positions_ptr, cos_ptr, sin_ptr, token, axis_stride, position_stride, angle_stride,
        column // 2 if ADJACENT else column % HALF, in_pair, SECTION, INTERLEAVED,
    )  # fmt: skip
    cos = tl.where(in_pair, cos.to(dtype).to(tl.float32), 1.0)
    sin = sin.to(dtype).to(tl.float32)
    # The first of a pair, and its distance from the other one.
    OTHER: tl.constexpr = 1 if ADJACENT else HALF
    first = column % 2 == 0 if ADJACENT else column < HALF
    partner = tl.where(in_pair, tl.where(first, column + OTHER, column - OTHER), column)
    return cos, tl.where(first, -sin, sin), partner


@triton.jit
def rotated(x, partner, cos, sin):
    """Rotate ``x`` against ``partner``; ``sin`` carries the sign. Rounds where torch rounds."""
    product = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    other = (partner.to(tl.float32) * sin).to(x.dtype).to(tl.float32)
    return (product + other).to(x.dtype)


# The stride between axes is the number of tokens; specialising on it would compile the kernel again and
# again.
@triton.jit(do_not_specialize=["axis_stride"])
def _rotary_kernel(
    q_ptr, k_ptr, positions_ptr, cos_ptr, sin_ptr, q_token, q_head, k_token, k_head,
    axis_stride, position_stride, angle_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    SECTION: tl.constexpr, INTERLEAVED: tl.constexpr, ADJACENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    q_row, k_row = q_ptr + token * q_token, k_ptr + token * k_token
    # All loads begin before the first is waited for.
    q, k = (
        load_pairs(q_row, q_head, Q_HEADS, HALF, ADJACENT),
        load_pairs(k_row, k_head, K_HEADS, HALF, ADJACENT),
    )
    angle = tl.arange(0, triton.next_power_of_2(HALF))
    cos, sin = load_angles(
        positions_ptr, cos_ptr, sin_ptr, token, axis_stride, position_stride, angle_stride,
        angle, angle < HALF, SECTION, INTERLEAVED,
    )  # fmt: skip
    store_rotated(q, q_row, q_head, cos, sin, Q_HEADS, HALF, ADJACENT)
    store_rotated(k, k_row, k_head, cos, sin, K_HEADS, HALF, ADJACENT)


@triton.jit
def load_pairs(in_ptr, in_head, HEADS: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr):
    """Load the first and the second number of each pair of all heads of one token: ``(HEADS, HALF)``, padded."""
    source, mask = _pairs(in_ptr, in_head, HEADS, HALF, ADJACENT)
    other = source + (1 if ADJACENT else HALF)
    return tl.load(source, mask=mask, other=0.0), tl.load(other, mask=mask, other=0.0)


@triton.jit
def store_rotated(
    pairs, out_ptr, out_head, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr
):  # fmt: skip
    """Rotate what :func:`load_pairs` has loaded, and store it."""
    first, second = _rotated(pairs[0], pairs[1], cos, sin)
    target, mask = _pairs(out_ptr, out_head, HEADS, HALF, ADJACENT)
    tl.store(target, first, mask=mask)
    tl.store(target + (1 if ADJACENT else HALF), second, mask=mask)


@triton.jit
def _pairs(ptr, head_stride, HEADS: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr):
    """Return pointers to the first numbers of the pairs of all heads, and which there are."""
    head = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    angle = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    return ptr + head * head_stride + angle * (2 if ADJACENT else 1), (head < HEADS) & (angle < HALF)


@triton.jit
def norm_and_rotate_heads(
    in_ptr, in_head, out_ptr, out_head, cos, sin, norm_ptr, eps, offset,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, OFFSET: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Rotate the norms of all heads of one token from ``in_ptr`` to ``out_ptr``, which may be the same, and store what
    of them is not rotated.

    LAST: what is rotated is normed, in place of that.
    """
    head = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    angle = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    mask = (head < HEADS) & (angle < HALF)
    STEP: tl.constexpr = 2 if ADJACENT else 1
    OTHER: tl.constexpr = 1 if ADJACENT else HALF
    REST: tl.constexpr = DIM - 2 * HALF
    source = in_ptr + head * in_head
    first = tl.load(source + angle * STEP, mask=mask, other=0.0)
    second = tl.load(source + angle * STEP + OTHER, mask=mask, other=0.0)
    if LAST:
        first, second = _rotated(first, second, cos, sin)
    squares = tl.sum(first.to(tl.float32) * first.to(tl.float32), axis=1, keep_dims=True)
    squares += tl.sum(second.to(tl.float32) * second.to(tl.float32), axis=1, keep_dims=True)
    if REST > 0:
        column = 2 * HALF + tl.arange(0, triton.next_power_of_2(REST))[None, :]
        known = (head < HEADS) & (column < DIM)
        rest = tl.load(source + column, mask=known, other=0.0)
        squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), axis=1, keep_dims=True)
    inverse = 1.0 / tl.sqrt(squares / DIM + eps)
    weight = tl.load(norm_ptr + angle * STEP, mask=angle < HALF, other=0.0)
    first = scaled_by_norm(first, inverse, weight, offset, OFFSET)
    weight = tl.load(norm_ptr + angle * STEP + OTHER, mask=angle < HALF, other=0.0)
    second = scaled_by_norm(second, inverse, weight, offset, OFFSET)
    if not LAST:
        first, second = _rotated(first, second, cos, sin)
    target = out_ptr + head * out_head
    tl.store(target + angle * STEP, first, mask=mask)
    tl.store(target + angle * STEP + OTHER, second, mask=mask)
    if REST > 0:
        weight = tl.load(norm_ptr + column, mask=column < DIM, other=0.0)
        tl.store(target + column, scaled_by_norm(rest, inverse, weight, offset, OFFSET), mask=known)


@triton.jit
def _rotated(first, second, cos, sin):
    """Rotate pairs of the first ones and the second ones.

    Sums are rounded where torch rounds them; a GPU may add products that are not rounded yet.
    """
    dtype = first.dtype
    c = cos[None, :].to(dtype).to(tl.float32)
    s = sin[None, :].to(dtype).to(tl.float32)
    first, second = first.to(tl.float32), second.to(tl.float32)
    low = (first * c).to(dtype).to(tl.float32) - (second * s).to(dtype).to(tl.float32)
    high = (second * c).to(dtype).to(tl.float32) + (first * s).to(dtype).to(tl.float32)
    return low.to(dtype), high.to(dtype)
