"""Rotation of new queries and keys, and the keys' and values' way into the paged cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton
from engine.kernels.launch import launch
from engine.kernels.overlap import overlap, wait_for_previous
from engine.kernels.rotary import load_angles, rotary_reference, rotate_heads


def rotary_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    mrope_section: tuple[int, ...] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    """Rotate ``q`` in place, and write ``k``, rotated, and ``v`` to each token's slot.

    Args:
        q, k, positions, cos, sin, mrope_section, mrope_interleaved: as :func:`~engine.kernels.rotary.rotary`
            takes them; what ``k`` holds afterwards is not defined.
        v: ``(T, Hkv, D)``; may be a strided view whose last dimension is contiguous.
        k_cache, v_cache: ``(N, Hkv, block_size, D)``, changed in place.
        slot_mapping: ``(T,)`` int64, ``block * block_size + offset``; negative entries write nothing.
    """
    assert (positions.dim() == 2) == (mrope_section is not None), "sections and axes come together"
    run = rotary_kv_write_triton if use_triton(q) else rotary_kv_write_reference
    run(
        q,
        k,
        v,
        positions,
        cos,
        sin,
        k_cache,
        v_cache,
        slot_mapping,
        mrope_section=mrope_section,
        mrope_interleaved=mrope_interleaved,
    )


def rotary_kv_write_reference(
    q,
    k,
    v,
    positions,
    cos,
    sin,
    k_cache,
    v_cache,
    slot_mapping,
    *,
    mrope_section=None,
    mrope_interleaved=False,
) -> None:
    rotary_reference(
        q, k, positions, cos, sin, mrope_section=mrope_section, mrope_interleaved=mrope_interleaved
    )
    block_size, kept = k_cache.shape[2], slot_mapping >= 0
    slots = slot_mapping[kept]
    k_cache[slots // block_size, :, slots % block_size] = k[kept]
    v_cache[slots // block_size, :, slots % block_size] = v[kept]


def rotary_kv_write_triton(
    q,
    k,
    v,
    positions,
    cos,
    sin,
    k_cache,
    v_cache,
    slot_mapping,
    *,
    mrope_section=None,
    mrope_interleaved=False,
) -> None:
    tokens, kv_heads, dim = k.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    if tokens == 0:
        return
    section, half = mrope_section or (0, 0, 0), cos.shape[-1]
    rest = dim - 2 * half
    launch(
        _rotary_kv_write_kernel,
        (tokens,),
        q,
        k,
        v,
        positions,
        cos,
        sin,
        k_cache,
        v_cache,
        slot_mapping,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        positions.stride(0) if mrope_section is not None else 0,
        positions.stride(-1),
        cos.stride(0),
        Q_HEADS=q.shape[1],
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_SIZE=k_cache.shape[2],
        HALF=half,
        REST=rest,
        SECTION_T=section[0],
        SECTION_H=section[1],
        SECTION_W=section[2],
        MROPE=mrope_section is not None,
        INTERLEAVED=mrope_interleaved,
        Q_HEADS_PAD=triton.next_power_of_2(q.shape[1]),
        KV_HEADS_PAD=triton.next_power_of_2(kv_heads),
        DIM_PAD=triton.next_power_of_2(dim),
        HALF_PAD=triton.next_power_of_2(half),
        REST_PAD=triton.next_power_of_2(max(rest, 1)),
        num_warps=4,
        **overlap(q),
    )


# Positions along several axes lie as far apart as there are tokens.
@triton.jit(do_not_specialize=["axis_stride"])
def _rotary_kv_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    axis_stride,
    position_stride,
    table_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    MROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_HEADS_PAD: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
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
    q_row = q_ptr + token * q_token
    rotate_heads(q_row, q_head, q_row, q_head, cos, sin, Q_HEADS, HALF, Q_HEADS_PAD, HALF_PAD)
    slot = tl.load(slot_ptr + token)
    if slot >= 0:
        place = (slot // BLOCK_SIZE * KV_HEADS * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM
        k_row, k_target = k_ptr + token * k_token, k_cache_ptr + place
        next_head = BLOCK_SIZE * DIM
        rotate_heads(k_row, k_head, k_target, next_head, cos, sin, KV_HEADS, HALF, KV_HEADS_PAD, HALF_PAD)
        head = tl.arange(0, KV_HEADS_PAD)[:, None]
        if REST > 0:
            rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
            mask = (head < KV_HEADS) & (rest < DIM)
            kept = tl.load(k_row + head * k_head + rest, mask=mask)
            tl.store(k_target + head * next_head + rest, kept, mask=mask)
        column = tl.arange(0, DIM_PAD)[None, :]
        mask = (head < KV_HEADS) & (column < DIM)
        value = tl.load(v_ptr + token * v_token + head * v_head + column, mask=mask)
        tl.store(v_cache_ptr + place + head * next_head + column, value, mask=mask)
