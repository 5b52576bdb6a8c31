"""Causal attention over a paged KV cache: prompt chunks, also mixed with decoding sequences, in one launch.

The rows of a query tile are query tokens of one sequence times the query heads that share a KV head, so keys
and values are read once for all of them. Keys come in tiles of their own size, gathered through the block
table. The host decides nothing by sequence length, so a captured CUDA graph stays valid while sequences grow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.fp8 import FP8
from engine.kernels.launch import launch
from engine.kernels.paged import (
    LOG2E,
    HeadKeys,
    attend,
    beside_fp8,
    empty_softmax,
    find_tile,
    query_tiles,
)
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.tile import AttentionTile


def paged_attention_reference(q, cache, meta, *, scale, window=None, cap=None, out=None):
    """Compute :func:`~engine.kernels.dispatch.paged_attention` in float32, one sequence after the other."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    starts, tables = meta.query_start.tolist(), meta.block_tables.long()
    for index, length in enumerate(meta.seq_lens.tolist()):
        begin, end = starts[index], starts[index + 1]
        if begin == end:
            continue
        # Keys before the windows of all queries are not even read.
        first_key = 0 if window is None else max(0, length - (end - begin) - window + 1)
        k = _read(cache.keys, tables[index], first_key, length, cache.key_scale)
        v = _read(cache.values, tables[index], first_key, length, cache.value_scale)
        # The query heads that share a KV head are rows of one matrix: (kv_heads, group * tokens, D).
        rows = q[begin:end].transpose(0, 1).reshape(cache.kv_heads, -1, q.shape[-1])
        scores = torch.bmm(rows.float(), k.transpose(1, 2)).mul_(scale)
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        if end - begin > 1 or meta.key_ends is not None:
            scores.unflatten(1, (-1, end - begin)).masked_fill_(
                _hidden(meta, begin, end, first_key, length, window), float("-inf")
            )
        heads = torch.bmm(scores.softmax(-1), v).view(q.shape[1], end - begin, -1)
        out[begin:end] = heads.transpose(0, 1)
    return out


def _read(
    blocks: torch.Tensor, table: torch.Tensor, first_key: int, length: int, scale: float
) -> torch.Tensor:
    """Return the keys or values ``first_key .. length - 1`` of one sequence, float32 ``(kv_heads, keys, D)``."""
    size = blocks.shape[2]
    first_block = first_key // size
    is_fp8 = blocks.dtype == FP8
    # torch can't index fp8 on a CPU.
    stored = blocks.view(torch.uint8) if is_fp8 else blocks
    read = stored.transpose(0, 1)[:, table[first_block : -(-length // size)]].flatten(1, 2)
    read = read[:, first_key - first_block * size : length - first_block * size]
    return read.view(FP8).float() * scale if is_fp8 else read.float()


def _hidden(meta, begin: int, end: int, first_key: int, length: int, window: int | None) -> torch.Tensor:
    """Return where keys ``first_key .. length - 1`` are hidden from tokens ``begin .. end - 1``, bool."""
    device = meta.block_tables.device
    position = torch.arange(length - (end - begin), length, device=device)[:, None]
    key = torch.arange(first_key, length, device=device)[None]
    hidden = key > position
    if meta.key_ends is not None:
        hidden = key >= meta.key_ends[begin:end, None]
        if meta.gaps:
            ends = torch.zeros(length, dtype=meta.key_ends.dtype, device=device)
            ends[length - (end - begin) :] = meta.key_ends[begin:end]
            hidden |= (key > position) & (ends[first_key:] != meta.key_ends[begin:end, None])
    return hidden if window is None else hidden | (key <= position - window)


def choose_tile(head_dim: int, group: int, itemsize: int) -> AttentionTile:
    """Choose the tile of a problem; measured on an H100.

    Of eight tiles it is the fastest for prompts of 448 and 704 tokens, and nearly the fastest for 8192.

    Args:
        group: query heads per KV head.
        itemsize: bytes of an element.
    """
    rows = triton.next_power_of_2(group)
    if head_dim > 128 or itemsize > 2:
        # Warps as in decode_attention.py.
        return AttentionTile(max(rows, 32), 32, 8 if head_dim > 256 else 4, 2)
    return AttentionTile(max(rows, 64), 64, 4, 2)


def paged_attention_triton(q, cache, meta, *, scale, window=None, cap=None, out=None, singles=True):
    """See :func:`engine.kernels.dispatch.paged_attention`.

    Args:
        singles: compute sequences with one new token, too.
    """
    tokens, heads, dim = q.shape
    kv_heads, sequences = cache.kv_heads, meta.seq_lens.shape[0]
    assert q.stride(-1) == 1 and meta.block_tables.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous()
    if tokens == 0 or sequences == 0:
        return out
    group = heads // kv_heads
    tile = choose_tile(dim, group, q.element_size())
    tokens_per_tile = tile.rows // group
    launch(
        _attention_kernel, (query_tiles(tokens, sequences, tokens_per_tile), kv_heads),
        q_ptr=q, k_ptr=cache.keys, v_ptr=cache.values, table_ptr=meta.block_tables,
        query_start_ptr=meta.query_start, seq_lens_ptr=meta.seq_lens, key_ends_ptr=meta.key_ends, out_ptr=out,
        sequences=sequences, scale=scale * cache.key_scale * LOG2E, value_scale=cache.value_scale, window=window or 0,
        q_token=q.stride(0), q_head=q.stride(1), table_row=meta.block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_SIZE=cache.block_size, BLOCK_STRIDE=cache.block_stride,
        FP8_CACHE=cache.is_fp8, SINGLES=singles, ROWS=tile.rows, KEYS=tile.keys, TOKENS=tokens_per_tile, WINDOW=window is not None,
        GAPS=meta.gaps, CAP=(cap or 0.0) * LOG2E,
        num_warps=tile.warps, num_stages=tile.stages, **pdl_options(q),
    )  # fmt: skip
    return out


# ``sequences`` differs between batch sizes; specialising on it would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["sequences"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, query_start_ptr, seq_lens_ptr, key_ends_ptr, out_ptr,
    sequences, scale, value_scale, window, q_token, q_head, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr,
    FP8_CACHE: tl.constexpr, SINGLES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    GAPS: tl.constexpr, CAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per query tile and KV head. TOKENS: query tokens per tile. CAP: of the scores, in units of
    log2(e); 0 without one.

    ``key_ends_ptr`` is None where every token sees the keys up to its own. GAPS: see
    :attr:`engine.kernels.paged.AttentionMetadata.gaps`.
    """
    wait_for_previous(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence, begin, first_token, count, length = find_tile(
        query_start_ptr, seq_lens_ptr, tile, sequences, TOKENS
    )
    if not SINGLES:
        count = tl.where(count == 1, 0, count)
    if first_token >= count:
        return

    DIM_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = (row < TOKENS * GROUP) & (token < count)
    column = tl.arange(0, DIM_PAD)
    q_offset = (begin + token).to(tl.int64) * q_token + head * q_head
    mask = valid[:, None] & (column[None, :] < DIM)
    q = tl.load(q_ptr + q_offset[:, None] + column[None, :], mask=mask, other=0.0)
    if FP8_CACHE:
        q = beside_fp8(q)
    position = length - count + token

    # Keys [start, end) are visible to some row; keys [start, whole) come in tiles that all rows see in full.
    last_token = tl.minimum(first_token + TOKENS, count) - 1
    least = length - count + first_token + 1
    end = length - count + last_token + 1
    last_key = position
    if key_ends_ptr is not None:
        last_key = tl.load(key_ends_ptr + begin + token, mask=valid, other=1) - 1
        if GAPS:
            end = tl.max(last_key) + 1
        else:
            least = tl.load(key_ends_ptr + begin + first_token)
            end = tl.load(key_ends_ptr + begin + last_token)
    start = 0
    if WINDOW:
        start = tl.maximum(length - count + first_token - window + 1, 0) // KEYS * KEYS
    whole = tl.minimum(least // KEYS * KEYS, end // KEYS * KEYS)
    whole = tl.maximum(whole, start)
    if WINDOW:
        whole = start

    head_stride = BLOCK_SIZE * DIM
    keys = HeadKeys(
        k_ptr + kv_head * head_stride,
        v_ptr + kv_head * head_stride,
        table_ptr + sequence.to(tl.int64) * table_row,
        BLOCK_STRIDE,
    )
    state = empty_softmax(ROWS, DIM_PAD)
    for first_key in range(start, whole, KEYS):
        state = attend(
            state, q, keys, first_key, last_key, position, length, scale, window,
            DIM, BLOCK_SIZE, KEYS, MASKED=False, WINDOW=WINDOW, CAP=CAP,
        )  # fmt: skip
    for first_key in range(whole, end, KEYS):
        last_keys = None
        if GAPS:
            # Those of tokens before the new ones don't matter: all rows see these keys.
            new = first_key + tl.arange(0, KEYS) - (length - count)
            last_keys = tl.load(key_ends_ptr + begin + new, mask=(new >= 0) & (new < count), other=0) - 1
        state = attend(
            state, q, keys, first_key, last_key, position, length, scale, window,
            DIM, BLOCK_SIZE, KEYS, MASKED=True, WINDOW=WINDOW, CAP=CAP, last_keys=last_keys,
        )  # fmt: skip

    result = state.acc / state.row_sum[:, None] * value_scale
    out_offset = ((begin + token).to(tl.int64) * KV_HEADS * GROUP + head)[:, None] * DIM
    tl.store(out_ptr + out_offset + column[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
