"""Attention of a decode step over a paged KV cache in one launch: norms of heads, rotation, cache write,
softmax and merge.

Every sequence has one new token. The rows of a tile are the query heads that share a KV head; keys come in
tiles gathered through the block table. With few sequences the keys of each are split over several programs
(flash-decoding): each computes its share from the sequence's length on the device, and the last one to finish
merges them. The new token's key and value are not read back from the cache: the program that writes them
starts its softmax with them.

Only the last tile of a program's share needs a mask. With few programs its load is issued before the previous
kernel has produced q (PDL), so it is processed first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.device import num_sms
from engine.kernels.fp8 import round_to_fp8
from engine.kernels.kv_write import rotary_kv_write_reference
from engine.kernels.launch import launch
from engine.kernels.paged import (
    LOG2E,
    HeadKeys,
    Softmax,
    accumulate,
    attend,
    beside_fp8,
    capped,
    empty_softmax,
    load_keys,
)
from engine.kernels.paged_attention import paged_attention_reference
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.rms_norm import inverse_rms, norm_arguments, scaled_by_norm
from engine.kernels.rotary import load_rotation, not_rotated, rotated
from engine.kernels.tile import AttentionTile

MAX_SPLITS = 32
#: From this many programs per SM on, keys are not split.
_MANY_PROGRAMS = 2


def decode_attention_reference(
    q, k, v, positions, table, cache, meta, *, scale, norms=None, window=None, cap=None
):  # fmt: skip
    """Compute :func:`~engine.kernels.dispatch.decode_attention` step by step; attention in float32."""
    rotary_kv_write_reference(q, k, v, positions, table, cache, meta.slot_mapping, norms)
    return paged_attention_reference(q, cache, meta, scale=scale, window=window, cap=cap)


def choose_tile(
    head_dim: int,
    group: int,
    itemsize: int,
    programs: int,
    sms: int,
    max_seq_len: int,
    *,
    fp8_cache: bool = False,
) -> AttentionTile:
    """Choose the tile of a problem.

    Of a dozen tiles it is among the best on an H100, by the time of whole decode steps of models of 2 and 7
    billion parameters.

    Args:
        group: query heads per KV head.
        itemsize: bytes of an element.
        programs: sequences times KV heads.
        sms: SMs of the GPU.
    """
    rows = max(16, triton.next_power_of_2(group))
    many = programs >= _MANY_PROGRAMS * sms
    large = head_dim > 128 or itemsize > 2
    keys = 32 if many or large else 64
    splits = num_splits(programs, sms, max_seq_len, keys)
    if large:
        # Heads of 512 take the registers of twice as many warps.
        return AttentionTile(rows, keys, 8 if head_dim > 256 else 4, 2, splits)
    if many:
        # Small programs keep an SM busier than large ones. Converting fp8 takes the registers of twice as many
        # warps.
        return AttentionTile(rows, keys, 2 if fp8_cache else 1, 3, splits)
    # With one program per SM, 8 warps finish sooner. With more programs than SMs, 2 warps leave room for the
    # next kernel's programs, which prefetch their weights.
    few = 4 if fp8_cache else 2
    return AttentionTile(rows, keys, 8 if programs * splits <= sms else few, 2, splits)


def num_splits(programs: int, sms: int, max_seq_len: int, keys: int) -> int:
    """Return the programs per sequence and KV head: enough for two programs on every SM."""
    enough = -(-_MANY_PROGRAMS * sms // max(programs, 1))
    return max(1, min(enough, MAX_SPLITS, -(-max_seq_len // keys)))


def _num_merged(group: int, dim: int, warps: int) -> int:
    """Return how many splits of a group of heads are merged at once: as many as the registers hold."""
    if warps < 8:
        return max(4, warps)
    per_split = triton.next_power_of_2(group) * triton.next_power_of_2(dim)
    # 128 of a thread's 255 registers: twice as many spill.
    return max(8, min(MAX_SPLITS, 128 * 32 * warps // per_split))


def decode_attention_triton(
    q, k, v, positions, table, cache, meta, *, scale, norms=None, window=None, cap=None
):  # fmt: skip
    """See :func:`engine.kernels.dispatch.decode_attention`."""
    sequences, heads, dim = q.shape
    kv_heads, group = cache.kv_heads, heads // cache.kv_heads
    tile = choose_tile(
        dim,
        group,
        q.element_size(),
        sequences * kv_heads,
        num_sms(q.device),
        meta.max_seq_len,
        fp8_cache=cache.is_fp8,
    )
    out, arguments = decode_arguments(
        q, k, v, positions, table, cache, meta, tile.splits, scale=scale, norms=norms, window=window, cap=cap
    )
    if sequences > 0:
        launch(
            _decode_kernel, (sequences, kv_heads, tile.splits), **arguments,
            FP8_CACHE=cache.is_fp8, ROWS=tile.rows, KEYS=tile.keys,
            MERGED=_num_merged(group, dim, tile.warps),
            # A single warp has no registers for a prefetched tile; and of borrowed keys an earlier layer of this
            # pass has written the last.
            PREFETCH=tile.warps > 1 and k is not None,
            num_warps=tile.warps, num_stages=tile.stages, **pdl_options(q),
        )  # fmt: skip
    return out


def decode_arguments(
    q, k, v, positions, table, cache, meta, splits: int, *, scale, norms, window, cap, out=None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the result of :func:`engine.kernels.dispatch.decode_attention`, not computed yet, and the arguments of its
    kernels that no tile decides.

    Args:
        table: None: nothing is rotated.
        out: see :func:`engine.kernels.dispatch.paged_attention`.
    """
    _, heads, dim = q.shape
    sequences, kv_heads = len(meta.seq_lens), cache.kv_heads
    borrowed = k is None
    if borrowed:
        # Never accessed.
        k = v = q
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == meta.block_tables.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    rotation = not_rotated(q) if table is None else table.arguments(positions)
    # Without a split these are never accessed; any tensor does.
    partial = stats = counters = out
    if splits > 1:
        partial = torch.empty((sequences, heads, splits, dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((sequences, heads, splits, 2), dtype=torch.float32, device=q.device)
        counters = meta.split_counters
        if counters is None:
            counters = torch.zeros((sequences, kv_heads), dtype=torch.int32, device=q.device)
        assert counters.is_contiguous() and counters.numel() >= sequences * kv_heads
    return out, {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, **norm_arguments(norms, q), **rotation,
        "k_cache_ptr": cache.keys, "v_cache_ptr": cache.values, "slot_ptr": meta.slot_mapping,
        "table_ptr": meta.block_tables, "seq_lens_ptr": meta.seq_lens,
        "out_ptr": out, "partial_ptr": partial, "stats_ptr": stats, "counters_ptr": counters,
        "splits": splits, "scale": scale * cache.key_scale * LOG2E, "window": window or 0,
        "key_scale": cache.key_scale, "value_scale": cache.value_scale,
        "q_token": q.stride(0), "q_head": q.stride(1), "k_token": k.stride(0), "k_head": k.stride(1),
        "v_token": v.stride(0), "v_head": v.stride(1), "table_row": meta.block_tables.stride(0),
        "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "DIM": dim,
        "BLOCK_SIZE": cache.block_size, "BLOCK_STRIDE": cache.block_stride,
        "BORROWED": borrowed, "WINDOW": window is not None, "SPLIT": splits > 1, "CAP": (cap or 0.0) * LOG2E,
    }  # fmt: skip


# ``splits`` differs between batch sizes; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["splits"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, eps, offset, positions_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, table_ptr,
    seq_lens_ptr, out_ptr, partial_ptr, stats_ptr, counters_ptr, splits, scale, window,
    key_scale, value_scale, q_token, q_head, k_token, k_head, v_token, v_head, axis_stride, position_stride, angle_stride, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr,
    FP8_CACHE: tl.constexpr, BORROWED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, LAST: tl.constexpr,
    HALF: tl.constexpr, SECTION: tl.constexpr, INTERLEAVED: tl.constexpr, ADJACENT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, CAP: tl.constexpr,
    MERGED: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence, KV head and split.

    Args:
        partial_ptr: ``(S, Hq, splits, D)`` float32, each split's unnormalised sum.
        stats_ptr: ``(S, Hq, splits, 2)`` float32, each split's maximum score and sum.
        counters_ptr: ``(S, Hkv)`` int32, splits that have finished.
        BORROWED: the new token's key and value are in the cache already.
        CAP: of the scores, in units of log2(e); 0 without one.
        MERGED: splits that are merged at a time.
        PREFETCH: load the share's last tile before waiting for the previous kernel.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    dtype = q_ptr.dtype.element_ty
    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    column = tl.arange(0, DIM_PAD)
    in_head = column < DIM
    # The previous kernel writes q, k and v. What is read before the wait was there before this pass.
    newest = tl.load(seq_lens_ptr + sequence) - 1
    cached = newest + 1 if BORROWED else newest
    cos, sin, partner = load_rotation(
        column, positions_ptr, cos_ptr, sin_ptr, sequence, axis_stride, position_stride, angle_stride, dtype,
        HALF, SECTION, INTERLEAVED, ADJACENT,
    )  # fmt: skip
    slot = tl.load(slot_ptr + sequence)
    if NORM:
        q_norm = tl.load(q_norm_ptr + column, mask=in_head, other=0.0)
        k_norm = tl.load(k_norm_ptr + column, mask=in_head, other=0.0)
        if not LAST:
            q_norm_partner = tl.load(q_norm_ptr + partner, mask=in_head, other=0.0)
            k_norm_partner = tl.load(k_norm_ptr + partner, mask=in_head, other=0.0)
    # This program's share of the visible keys in the cache; the first ``used`` splits have one.
    start = 0
    if WINDOW:
        start = tl.maximum(newest - window + 1, 0) // KEYS * KEYS
    share = tl.maximum(tl.cdiv(tl.cdiv(cached - start, KEYS), splits), 1) * KEYS
    used = tl.maximum(tl.cdiv(cached - start, share), 1)
    start = start + split * share
    end = tl.minimum(start + share, cached)
    last = tl.maximum((end - 1) // KEYS * KEYS, start)
    head_stride = BLOCK_SIZE * DIM
    keys = HeadKeys(
        k_cache_ptr + kv_head * head_stride,
        v_cache_ptr + kv_head * head_stride,
        table_ptr + sequence * table_row,
        BLOCK_STRIDE,
    )
    if PREFETCH:
        last_k, last_v = load_keys(keys, last, end, DIM, BLOCK_SIZE, KEYS, MASKED=True)
    wait_for_previous(PDL)
    if split >= used:
        return

    row = tl.arange(0, ROWS)
    valid = row < GROUP
    head = kv_head * GROUP + row
    mask = valid[:, None] & in_head[None, :]
    q_row = q_ptr + sequence * q_token + head[:, None] * q_head
    q = tl.load(q_row + column[None, :], mask=mask, other=0.0)
    q_partner = tl.load(q_row + partner[None, :], mask=mask, other=0.0)
    if not BORROWED:
        # The new token's key and value, which only the first split needs: loaded later, it would wait for them
        # twice.
        k_row = k_ptr + sequence * k_token + kv_head * k_head
        k = tl.load(k_row + column, mask=in_head, other=0.0)
        k_partner = tl.load(k_row + partner, mask=in_head, other=0.0)
        v = tl.load(v_ptr + sequence * v_token + kv_head * v_head + column, mask=in_head, other=0.0)
    if NORM and not LAST:
        inverse = inverse_rms(q, 1, eps, DIM)
        q = scaled_by_norm(q, inverse, q_norm[None, :], offset, OFFSET)
        q_partner = scaled_by_norm(q_partner, inverse, q_norm_partner[None, :], offset, OFFSET)
    q = rotated(q, q_partner, cos[None, :], sin[None, :])
    if NORM and LAST:
        q = scaled_by_norm(q, inverse_rms(q, 1, eps, DIM), q_norm[None, :], offset, OFFSET)

    acc, row_max, row_sum = empty_softmax(ROWS, DIM_PAD)
    if split == 0 and not BORROWED:
        # The new token: its key and value go to the cache, and are the first of the softmax.
        if NORM and not LAST:
            inverse_k = inverse_rms(k, 0, eps, DIM)
            k = scaled_by_norm(k, inverse_k, k_norm, offset, OFFSET)
            k_partner = scaled_by_norm(k_partner, inverse_k, k_norm_partner, offset, OFFSET)
        new_k, new_v = rotated(k, k_partner, cos, sin), v
        if NORM and LAST:
            new_k = scaled_by_norm(new_k, inverse_rms(new_k, 0, eps, DIM), k_norm, offset, OFFSET)
        if FP8_CACHE:
            # Attention sees the rounded ones, as later steps do.
            new_k = round_to_fp8(new_k, key_scale, k_cache_ptr.dtype.element_ty)
            new_v = round_to_fp8(new_v, value_scale, v_cache_ptr.dtype.element_ty)
        if slot >= 0:
            place = slot // BLOCK_SIZE * BLOCK_STRIDE + kv_head * head_stride + slot % BLOCK_SIZE * DIM
            tl.store(k_cache_ptr + place + column, new_k, mask=in_head)
            tl.store(v_cache_ptr + place + column, new_v, mask=in_head)
        row_max = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], axis=1) * scale
        if CAP > 0:
            row_max = capped(row_max, 1.0, CAP)
        row_sum += 1.0
        acc += new_v.to(tl.float32)[None, :]

    if FP8_CACHE:
        q = beside_fp8(q)
    position = tl.zeros([ROWS], tl.int32) + newest
    state = Softmax(acc, row_max, row_sum)
    if PREFETCH:
        state = accumulate(
            state, q, last_k, last_v, last, position, position, end, scale, window,
            MASKED=True, WINDOW=WINDOW, CAP=CAP,
        )  # fmt: skip
    for first_key in range(start, last, KEYS):
        state = attend(
            state, q, keys, first_key, position, position, end, scale, window,
            DIM, BLOCK_SIZE, KEYS, MASKED=WINDOW, WINDOW=WINDOW, CAP=CAP,
        )  # fmt: skip
    if not PREFETCH:
        for first_key in range(last, end, KEYS):
            state = attend(
                state, q, keys, first_key, position, position, end, scale, window,
                DIM, BLOCK_SIZE, KEYS, MASKED=True, WINDOW=WINDOW, CAP=CAP,
            )  # fmt: skip

    HEADS: tl.constexpr = KV_HEADS * GROUP
    alone = used == 1
    if alone:
        target = out_ptr + (sequence * HEADS + head[:, None]) * DIM + column[None, :]
        tl.store(target, (state.acc / state.row_sum[:, None] * value_scale).to(dtype), mask=mask)
    if SPLIT:
        if not alone:
            part = (sequence * HEADS + head) * splits + split
            tl.store(partial_ptr + part[:, None] * DIM + column[None, :], state.acc, mask=mask)
            tl.store(stats_ptr + part * 2, state.row_max, mask=valid)
            tl.store(stats_ptr + part * 2 + 1, state.row_sum, mask=valid)
            # All threads must have written before the program counts itself as finished.
            tl.debug_barrier()
            counter = counters_ptr + sequence * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                tl.store(counter, 0)
                first_head = sequence * HEADS + kv_head * GROUP
                _merge(
                    partial_ptr, stats_ptr, out_ptr, first_head, splits, used, value_scale, GROUP, DIM, MERGED
                )  # fmt: skip


@triton.jit
def _merge(
    partial_ptr, stats_ptr, out_ptr, first_head, splits, used, value_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Merge the ``used`` splits of a group of heads by their maxima and sums.

    It loads ``MERGED`` splits at a time, so their loads are in flight together.
    """
    GROUP_PAD: tl.constexpr = triton.next_power_of_2(GROUP)
    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    row = tl.arange(0, GROUP_PAD)
    valid = row < GROUP
    head = first_head + row
    column = tl.arange(0, DIM_PAD)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    row_sum = tl.zeros([GROUP_PAD], tl.float32)
    # Rows beyond the group have no scores; a finite maximum keeps NaN out of them. They are not stored.
    row_max = tl.where(valid, float("-inf"), 0.0)
    for first in range(0, used, MERGED):
        split = first + tl.arange(0, MERGED)
        in_range = valid[:, None] & (split < used)[None, :]
        part = head[:, None] * splits + split[None, :]
        maxima = tl.load(stats_ptr + part * 2, mask=in_range, other=float("-inf"))
        sums = tl.load(stats_ptr + part * 2 + 1, mask=in_range, other=0.0)
        mask = in_range[:, :, None] & (column < DIM)[None, None, :]
        partial = tl.load(partial_ptr + part[:, :, None] * DIM + column[None, None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tl.max(maxima, axis=1))
        weights = tl.exp2(maxima - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(sums * weights, axis=1)
        acc = acc * decay[:, None] + tl.sum(partial * weights[:, :, None], axis=1)
        row_max = new_max
    target = out_ptr + head[:, None] * DIM + column[None, :]
    mask = valid[:, None] & (column < DIM)[None, :]
    tl.store(target, (acc / row_sum[:, None] * value_scale).to(out_ptr.dtype.element_ty), mask=mask)
