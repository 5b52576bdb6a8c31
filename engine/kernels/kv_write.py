"""Norms of heads and rotation of new queries and keys, and the write of keys and values to the paged cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.fp8 import FP8, LARGEST, round_to_fp8
from engine.kernels.launch import launch
from engine.kernels.paged import KVCache
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.rms_norm import HeadNorms, head_norms_reference, norm_arguments
from engine.kernels.rotary import (
    RotaryTable,
    load_angles,
    load_pairs,
    norm_and_rotate_heads,
    rotary_reference,
    store_rotated,
)


def rotary_kv_write(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    positions: torch.Tensor,
    table: RotaryTable,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate ``q`` in place; write the rotated ``k``, and ``v``, to each token's KV slot if there are such.

    With ``norms`` it rotates :func:`~engine.kernels.rms_norm.head_norms`, or norms what it has rotated.

    Args:
        q, k, positions, table: see :func:`~engine.kernels.rotary.rotary`; ``k`` is undefined afterwards.
        v: ``(T, Hkv, D)``; may be a strided view with a contiguous last dimension.
        cache: changed in place.
        slot_mapping: see :class:`~engine.kernels.paged.AttentionMetadata`.
    """
    run = rotary_kv_write_triton if use_triton(q) else rotary_kv_write_reference
    run(q, k, v, positions, table, cache, slot_mapping, norms)


def rotary_kv_write_reference(q, k, v, positions, table, cache, slot_mapping, norms=None) -> None:
    borrowed = k is None
    k = q[:, :0] if borrowed else k
    if norms is not None and not norms.last:
        k = _norm_reference(q, k, norms)
    rotary_reference(q, k, positions, table)
    if norms is not None and norms.last:
        k = _norm_reference(q, k, norms)
    if borrowed:
        return
    written = slot_mapping >= 0
    if not written.all():
        k, v, slot_mapping = k[written], v[written], slot_mapping[written]
    block, offset = slot_mapping // cache.block_size, slot_mapping % cache.block_size
    _write(cache.keys, block, offset, k, cache.key_scale)
    _write(cache.values, block, offset, v, cache.value_scale)


def _norm_reference(q, k, norms):
    """Norm queries in place, and return the norms of keys."""
    normed, k = head_norms_reference(q, k, norms)
    q.copy_(normed)
    return k


def _write(blocks, block, offset, rows, scale: float) -> None:
    if blocks.dtype == FP8:
        # torch can't index fp8 on a CPU.
        rows = (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FP8).view(torch.uint8)
        blocks = blocks.view(torch.uint8)
    blocks.transpose(1, 2)[block, offset] = rows


def rotary_kv_write_triton(q, k, v, positions, table, cache, slot_mapping, norms=None) -> None:
    borrowed = k is None
    if borrowed:
        # Read and not used.
        k = v = q
    tokens, kv_heads, dim = k.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if tokens == 0:
        return
    launch(
        _rotary_kv_write_kernel, (tokens,),
        q_ptr=q, k_ptr=k, v_ptr=v, **norm_arguments(norms, q), **table.arguments(positions),
        k_cache_ptr=cache.keys, v_cache_ptr=cache.values, slot_ptr=slot_mapping,
        q_token=q.stride(0), q_head=q.stride(1), k_token=k.stride(0), k_head=k.stride(1),
        v_token=v.stride(0), v_head=v.stride(1),
        key_scale=cache.key_scale, value_scale=cache.value_scale,
        Q_HEADS=q.shape[1], KV_HEADS=kv_heads, DIM=dim, BLOCK_SIZE=cache.block_size,
        BLOCK_STRIDE=cache.block_stride, FP8_CACHE=cache.is_fp8, BORROWED=borrowed,
        num_warps=4, **pdl_options(q),
    )  # fmt: skip


# The stride between axes is the number of tokens; specialising on it would compile the kernel again and
# again.
@triton.jit(do_not_specialize=["axis_stride"])
def _rotary_kv_write_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, eps, offset, positions_ptr, cos_ptr, sin_ptr,
    k_cache_ptr, v_cache_ptr, slot_ptr, q_token, q_head, k_token, k_head, v_token, v_head, axis_stride, position_stride, angle_stride,
    key_scale, value_scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr,
    FP8_CACHE: tl.constexpr, BORROWED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, LAST: tl.constexpr,
    HALF: tl.constexpr, SECTION: tl.constexpr, INTERLEAVED: tl.constexpr, ADJACENT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per token. BORROWED: there are no keys and values to write; the pointers to them are those of the
    queries."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    q_row, k_row = q_ptr + token * q_token, k_ptr + token * k_token
    # Loads begin before the first is waited for, where they may.
    if not NORM:
        q = load_pairs(q_row, q_head, Q_HEADS, HALF, ADJACENT)
        k = load_pairs(k_row, k_head, KV_HEADS, HALF, ADJACENT)
    slot = tl.load(slot_ptr + token)
    head = tl.arange(0, triton.next_power_of_2(KV_HEADS))[:, None]
    column = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    mask = (head < KV_HEADS) & (column < DIM)
    value = tl.load(v_ptr + token * v_token + head * v_head + column, mask=mask)
    angle = tl.arange(0, triton.next_power_of_2(HALF))
    cos, sin = load_angles(
        positions_ptr, cos_ptr, sin_ptr, token, axis_stride, position_stride, angle_stride,
        angle, angle < HALF, SECTION, INTERLEAVED,
    )  # fmt: skip
    if NORM:
        norm_and_rotate_heads(
            q_row, q_head, q_row, q_head, cos, sin, q_norm_ptr, eps, offset,
            Q_HEADS, DIM, HALF, ADJACENT, OFFSET, LAST,
        )  # fmt: skip
    else:
        store_rotated(q, q_row, q_head, cos, sin, Q_HEADS, HALF, ADJACENT)
    if slot >= 0 and not BORROWED:
        place = slot // BLOCK_SIZE * BLOCK_STRIDE + slot % BLOCK_SIZE * DIM
        k_target = k_cache_ptr + place
        head_stride = BLOCK_SIZE * DIM
        # Dimensions of a head that are not rotated.
        REST: tl.constexpr = DIM - 2 * HALF
        rotated, rotated_head = k_target, head_stride
        if FP8_CACHE:
            # Keys are rotated in place, and rounded once all threads have written.
            rotated, rotated_head = k_row, k_head
        if NORM:
            norm_and_rotate_heads(
                k_row, k_head, rotated, rotated_head, cos, sin, k_norm_ptr, eps, offset,
                KV_HEADS, DIM, HALF, ADJACENT, OFFSET, LAST,
            )  # fmt: skip
        else:
            store_rotated(k, rotated, rotated_head, cos, sin, KV_HEADS, HALF, ADJACENT)
        if FP8_CACHE:
            tl.debug_barrier()
        if REST > 0 and not FP8_CACHE and not NORM:
            behind = 2 * HALF + tl.arange(0, triton.next_power_of_2(REST))[None, :]
            known = (head < KV_HEADS) & (behind < DIM)
            rest = tl.load(k_row + head * k_head + behind, mask=known)
            tl.store(k_target + head * head_stride + behind, rest, mask=known)
        if FP8_CACHE:
            key = tl.load(k_row + head * k_head + column, mask=mask, other=0.0)
            key = round_to_fp8(key, key_scale, k_cache_ptr.dtype.element_ty)
            tl.store(k_target + head * head_stride + column, key, mask=mask)
            rounded = round_to_fp8(value, value_scale, v_cache_ptr.dtype.element_ty)
        else:
            rounded = value
        tl.store(v_cache_ptr + place + head * head_stride + column, rounded, mask=mask)
