"""Causal attention over a paged KV cache: prefill, and mixtures with decode, in one launch.

Query tokens of a sequence and the query heads that share a KV head are packed into the rows of one tile, so
that keys and values are read once for all of them. Keys come in tiles of their own size, gathered through the
block table. Nothing about lengths is decided on the host, so a captured graph stays valid as they grow. Where
every sequence has one token, :mod:`engine.kernels.decode_attention` does it all; long prompts go to
:mod:`engine.kernels.prefill_attention` where it can take them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton
from engine.kernels.launch import is_compiling, launch
from engine.kernels.overlap import overlap, wait_for_previous
from engine.kernels.prefill_attention import LONG, can_take, prefill_attention_gluon
from engine.kernels.sequences import find_sequence
from engine.kernels.tiling import Tiling

LOG2E = 1.4426950408889634


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    max_query_len: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each sequence's new tokens over all its tokens up to themselves.

    Sequence ``s`` brings queries ``query_start[s] : query_start[s + 1]``, the last of its ``seq_lens[s]``
    tokens; their keys and values are in the cache already.

    Args:
        q: ``(T, Hq, D)``, last dimension contiguous. Rows from ``query_start[S]`` on are padding.
        k_cache, v_cache: ``(N, Hkv, block_size, D)`` contiguous; ``Hq`` is a multiple of ``Hkv``.
        block_tables: ``(S, max_blocks)`` int32.
        query_start: ``(S + 1,)`` int32.
        seq_lens: ``(S,)`` int32.
        scale: multiplies the scores; positive.
        window: a query at position p sees keys at positions greater than ``p - window``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        max_query_len: at least the most queries of one sequence, as the host knows it; it decides by which kernel.
        out: ``(T, Hq, D)`` contiguous, to write to; padding rows are left as they are.

    Returns:
        ``(T, Hq, D)``.
    """
    arguments = (q, k_cache, v_cache, block_tables, query_start, seq_lens)
    options = {"scale": scale, "window": window, "softcap": softcap}
    if not use_triton(q):
        return paged_attention_reference(*arguments, **options, out=out)
    if window is None and softcap is None and can_take(q, k_cache):
        # Ahead of time the kernels for other lengths are compiled as well.
        if max_query_len > LONG or is_compiling():
            out = prefill_attention_gluon(*arguments, scale=scale, out=out)
        if max_query_len > LONG and not is_compiling():
            return out
    return paged_attention_triton(*arguments, **options, out=out)


def paged_attention_reference(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start,
    seq_lens,
    *,
    scale,
    window=None,
    softcap=None,
    out=None,
):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    group, block_size = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    starts = query_start.tolist()
    for index, length in enumerate(seq_lens.tolist()):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        blocks = block_tables[index, : -(-length // block_size)].long()
        k = k_cache[blocks].transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        v = v_cache[blocks].transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last].float(), k.float()) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length - (last - first), length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None]
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)
    return out


def tiling(head_dim: int, group: int, itemsize: int) -> Tiling:
    """The tile for a problem; the one place where this is decided.

    The fastest of eight on an H100 for prompts of 448 and 704 tokens, and for 8192 all but the fastest.
    """
    rows = triton.next_power_of_2(group)
    if head_dim > 128 or itemsize > 2:
        return Tiling(max(rows, 32), 32, 4, 2)
    return Tiling(max(rows, 64), 64, 4, 2)


def paged_attention_triton(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start,
    seq_lens,
    *,
    scale,
    window=None,
    softcap=None,
    out=None,
):
    tokens, heads, dim = q.shape
    kv_heads, block_size, sequences = k_cache.shape[1], k_cache.shape[2], seq_lens.shape[0]
    assert q.stride(-1) == 1 and block_tables.stride(-1) == 1
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous()
    if tokens == 0 or sequences == 0:
        return out
    group = heads // kv_heads
    tile = tiling(dim, group, q.element_size())
    tokens_per_tile = tile.rows // group
    # Each sequence starts a tile of its own, so there can be one more tile per sequence than tokens fill.
    tiles = tokens // tokens_per_tile + sequences
    launch(
        _attention_kernel,
        (tiles, kv_heads),
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start,
        seq_lens,
        out,
        sequences,
        scale * LOG2E,
        0.0 if softcap is None else softcap * LOG2E,
        0 if window is None else window,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        BLOCK_SIZE=block_size,
        ROWS=tile.rows,
        KEYS=tile.keys,
        TOKENS=tokens_per_tile,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlap(q),
    )
    return out


@triton.jit
def load_keys(
    k_ptr,
    v_ptr,
    table_ptr,
    first_key,
    length,
    block_stride,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys, ``(DIM_PAD, KEYS)``, and values, ``(KEYS, DIM_PAD)``; unmasked ones lie before ``length``."""
    key = first_key + tl.arange(0, KEYS)
    column = tl.arange(0, DIM_PAD)
    inside = key < length
    if MASKED:
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    else:
        block = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
    place = block * block_stride + (key % BLOCK_SIZE) * DIM
    if MASKED or DIM != DIM_PAD:
        k_mask = (column[:, None] < DIM) & inside[None, :]
        v_mask = inside[:, None] & (column[None, :] < DIM)
        k = tl.load(k_ptr + place[None, :] + column[:, None], mask=k_mask, other=0.0)
        v = tl.load(v_ptr + place[:, None] + column[None, :], mask=v_mask, other=0.0)
    else:
        k = tl.load(k_ptr + place[None, :] + column[:, None])
        v = tl.load(v_ptr + place[:, None] + column[None, :])
    return k, v


@triton.jit
def accumulate(
    acc,
    top,
    total,
    q,
    k,
    v,
    first_key,
    position,
    length,
    scale,
    cap,
    window,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """A tile of keys that is loaded into the running softmax. Unmasked ones lie wholly before every row's position."""
    key = first_key + tl.arange(0, KEYS)
    inside = key < length
    scores = tl.dot(q, k, input_precision="ieee")
    if SOFTCAP:
        # tanh(x) = 2 sigmoid(2x) - 1; scores and cap are both in units of log2(e).
        scores = cap * (2.0 * tl.sigmoid(2.0 * scores * scale / cap) - 1.0)
        scale = 1.0
    if MASKED:
        seen = (key[None, :] <= position[:, None]) & inside[None, :]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    # Scaled together with the subtraction below, each score takes one operation.
    higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
    base = higher
    if MASKED:
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, higher, total


@triton.jit
def attend(
    acc,
    top,
    total,
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    first_key,
    position,
    length,
    scale,
    cap,
    window,
    block_stride,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One tile of keys out of the cache into the running softmax."""
    k, v = load_keys(
        k_ptr,
        v_ptr,
        table_ptr,
        first_key,
        length,
        block_stride,
        DIM,
        DIM_PAD,
        BLOCK_SIZE,
        KEYS,
        MASKED,
    )
    return accumulate(
        acc,
        top,
        total,
        q,
        k,
        v,
        first_key,
        position,
        length,
        scale,
        cap,
        window,
        KEYS,
        MASKED,
        WINDOW,
        SOFTCAP,
    )


# Batch sizes differ in these numbers; a kernel compiled for each would make a long start.
@triton.jit(do_not_specialize=["sequences"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,
    sequences,
    scale,
    cap,
    window,
    q_token,
    q_head,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = find_sequence(query_start_ptr, tile, sequences, TOKENS)
    begin = tl.load(query_start_ptr + sequence)
    first_token = (tile - begin // TOKENS - sequence) * TOKENS
    count = tl.load(query_start_ptr + sequence + 1) - begin
    length = tl.load(seq_lens_ptr + sequence)
    if first_token >= count:
        return

    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = (row < TOKENS * GROUP) & (token < count)
    column = tl.arange(0, DIM_PAD)
    q_place = (begin + token).to(tl.int64) * q_token + head * q_head
    q_mask = live[:, None] & (column[None, :] < DIM)
    q = tl.load(q_ptr + q_place[:, None] + column[None, :], mask=q_mask, other=0.0)
    position = length - count + token

    # Keys that any row sees, and those that every row sees in full.
    last_token = tl.minimum(first_token + TOKENS, count) - 1
    end = length - count + last_token + 1
    start = 0
    if WINDOW:
        start = tl.maximum(length - count + first_token - window + 1, 0) // KEYS * KEYS
    whole = tl.minimum((length - count + first_token + 1) // KEYS * KEYS, end // KEYS * KEYS)
    whole = tl.maximum(whole, start)
    if WINDOW:
        whole = start

    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    head_stride = BLOCK_SIZE * DIM
    block_stride = KV_HEADS * BLOCK_SIZE * DIM
    k_base = k_ptr + kv_head * head_stride
    v_base = v_ptr + kv_head * head_stride
    table = table_ptr + sequence.to(tl.int64) * table_row
    for first_key in range(start, whole, KEYS):
        acc, top, total = attend(
            acc,
            top,
            total,
            q,
            k_base,
            v_base,
            table,
            first_key,
            position,
            length,
            scale,
            cap,
            window,
            block_stride,
            DIM,
            DIM_PAD,
            BLOCK_SIZE,
            KEYS,
            False,
            WINDOW,
            SOFTCAP,
        )
    for first_key in range(whole, end, KEYS):
        acc, top, total = attend(
            acc,
            top,
            total,
            q,
            k_base,
            v_base,
            table,
            first_key,
            position,
            length,
            scale,
            cap,
            window,
            block_stride,
            DIM,
            DIM_PAD,
            BLOCK_SIZE,
            KEYS,
            True,
            WINDOW,
            SOFTCAP,
        )

    out_mask = live[:, None] & (column[None, :] < DIM)
    result = acc / total[:, None]
    place = ((begin + token).to(tl.int64) * KV_HEADS * GROUP + head)[:, None] * DIM
    tl.store(out_ptr + place + column[None, :], result.to(out_ptr.dtype.element_ty), mask=out_mask)
