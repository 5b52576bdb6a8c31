"""Causal attention of long prompts over a paged KV cache, for Hopper GPUs.

It computes what :mod:`engine.kernels.paged_attention` does. That kernel multiplies, exponentiates and multiplies
one after the other, and each of its tiles of 64 rows reads all keys. Here a program's warps have parts of their own
(Shah et al., FlashAttention-3, 2024): one warp fetches tiles of keys and values block by block through tensor memory
descriptors, and two groups of four warps, with 64 rows each, share what it fetched. A group multiplies by the next
tile's keys and by the last tile's values while it exponentiates, and so does the other one.

This takes control over layouts, barriers and asynchronous products, which Gluon gives and Triton's language does not.
Gluon has no interpreter: the kernel runs on a GPU or not at all, and its tests compare it with the reference there.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.dispatch import use_triton
from engine.kernels.launch import launch
from engine.kernels.sequences import find_sequence
from engine.kernels.tiling import nvidia_capability

#: With more queries of one sequence it pays; shorter prompts don't fill its tiles.
LONG = 1024

_LOG2E = 1.4426950408889634
#: Rows of a program, half of them for either group of warps; keys of a tile, and tiles that are in memory at a time.
_ROWS, _KEYS, _STAGES = 128, 128, 2
#: Registers per thread: with three groups of warps all that a processor has. The two that compute take what the one
#: that fetches gives up.
_REGISTERS, _COMPUTING, _FETCHING = 168, 240, 24
#: Newer versions have another name for it.
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_find_sequence = gluon.jit(find_sequence.fn)


def can_take(q: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Whether the kernel can compute the attention of ``q`` ``(T, Hq, D)`` over a cache ``(N, Hkv, block_size, D)``."""
    group, (_, _, block_size, dim) = q.shape[1] // k_cache.shape[1], k_cache.shape
    fits = dim in (16, 32, 64, 128) and group <= _ROWS and block_size >= 8 and q.dtype == k_cache.dtype
    return fits and q.element_size() == 2 and use_triton(q) and nvidia_capability(q.device) == (9, 0)


def prefill_attention_gluon(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`engine.kernels.paged_attention.paged_attention`; for what :func:`can_take` admits."""
    tokens, heads, dim = q.shape
    kv_heads, block_size, sequences = k_cache.shape[1], k_cache.shape[2], seq_lens.shape[0]
    assert q.stride(-1) == 1 and block_tables.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous()
    if tokens == 0 or sequences == 0:
        return out
    group = heads // kv_heads
    tokens_per_tile = _ROWS // group
    launch(
        _prefill_kernel,
        # Each sequence starts a tile of its own, so there can be one more tile per sequence than tokens fill.
        (tokens // tokens_per_tile + sequences, kv_heads),
        q,
        _describe(k_cache),
        _describe(v_cache),
        block_tables,
        query_start,
        seq_lens,
        out,
        sequences,
        scale * _LOG2E,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=block_size,
        KEYS=_KEYS,
        TOKENS=tokens_per_tile,
        STAGES=_STAGES,
        COMPUTING=_COMPUTING,
        FETCHING=_FETCHING,
        num_warps=4,
        maxnreg=_REGISTERS,
    )
    return out


def _describe(cache: torch.Tensor) -> TensorDescriptor:
    """A cache as rows of one token and head each, of which a block's, or a tile's if it is smaller, come at a time."""
    found = _DESCRIPTORS.get(cache)
    if found is None:
        block_size, dim = cache.shape[2:]
        part = [min(block_size, _KEYS), dim]
        dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[cache.dtype]
        layout = gl.NVMMASharedLayout.get_default_for(part, dtype)
        found = _DESCRIPTORS[cache] = TensorDescriptor.from_tensor(cache.view(-1, dim), part, layout)
    return found


#: What the host needs longest for at a launch, kept as long as the cache.
_DESCRIPTORS = WeakTensorKeyDictionary()


# Batches differ in this number; a kernel compiled for each would make a long start.
@gluon.jit(do_not_specialize=["sequences"])
def _prefill_kernel(
    q_ptr,
    k_desc,
    v_desc,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,
    sequences,
    scale,
    q_token,
    q_head,
    table_row,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    KEYS: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTING: gl.constexpr,
    FETCHING: gl.constexpr,
):
    # The last tile of a prompt has the most keys: started first, it isn't what is left at the end.
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    kv_head = gl.program_id(1)
    sequence = _find_sequence(query_start_ptr, tile, sequences, TOKENS)
    begin = gl.load(query_start_ptr + sequence)
    first_token = (tile - begin // TOKENS - sequence) * TOKENS
    count = gl.load(query_start_ptr + sequence + 1) - begin
    length = gl.load(seq_lens_ptr + sequence)
    if first_token < count:
        # Tiles of keys that any row sees, from the last to the first, and how many of them not all rows see in full.
        before = length - count + first_token
        num_tiles = gl.cdiv(length - count + gl.minimum(first_token + TOKENS, count), KEYS)
        masked = num_tiles - (before + 1) // KEYS
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        queries = _buffers(2, 64, DIM, dtype)
        keys = _buffers(STAGES, KEYS, DIM, dtype)
        values = _buffers(STAGES, KEYS, DIM, dtype)
        # What was fetched is there; both groups are through with it.
        keys_ready, keys_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
        values_ready, values_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
        ring = (keys, keys_ready, keys_free, values, values_ready, values_free)
        head = kv_head * GROUP
        place = (begin, first_token, count, length, head, num_tiles, masked)
        strides = (q_token, q_head)
        table = table_ptr + sequence.to(gl.int64) * table_row
        work = (q_ptr, out_ptr, queries, ring, place, strides, scale)
        first: gl.constexpr = 0
        second: gl.constexpr = 1
        gl.warp_specialize(
            [
                (_attend, (first, work, KV_HEADS * GROUP, GROUP, TOKENS, STAGES)),
                (_attend, (second, work, KV_HEADS * GROUP, GROUP, TOKENS, STAGES)),
                (
                    _fetch_tiles,
                    (k_desc, v_desc, table, ring, length, kv_head, num_tiles, KV_HEADS, BLOCK_SIZE, STAGES),
                ),
            ],
            [4, 1],
            [COMPUTING, FETCHING],
        )


@gluon.jit
def _buffers(COUNT: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, dtype: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    return gl.allocate_shared_memory(dtype, [COUNT, ROWS, DIM], layout)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(barriers.index(index), count=ARRIVALS)
    return barriers


@gluon.jit
def _fetch_tiles(
    k_desc,
    v_desc,
    table,
    ring,
    length,
    kv_head,
    num_tiles,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The part of one warp: tiles of keys and values into the ring."""
    keys, keys_ready, keys_free, values, values_ready, values_free = ring
    for index in range(num_tiles):
        stage = index % STAGES
        # A barrier that nobody has arrived at counts as the end of the phase before its first.
        phase = (index // STAGES & 1) ^ 1
        first_key = (num_tiles - 1 - index) * keys.shape[1]
        mbarrier.wait(keys_free.index(stage), phase)
        _fetch_tile(
            k_desc,
            table,
            keys.index(stage),
            keys_ready.index(stage),
            first_key,
            length,
            kv_head,
            KV_HEADS,
            BLOCK_SIZE,
        )
        mbarrier.wait(values_free.index(stage), phase)
        _fetch_tile(
            v_desc,
            table,
            values.index(stage),
            values_ready.index(stage),
            first_key,
            length,
            kv_head,
            KV_HEADS,
            BLOCK_SIZE,
        )


@gluon.jit
def _fetch_tile(
    desc, table, tile, ready, first_key, length, kv_head, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr
):
    """The tile of keys, or of values, from ``first_key`` on. What is there beyond the last block is that block again."""
    KEYS: gl.constexpr = tile.shape[0]
    PART: gl.constexpr = desc.block_type.shape[0]
    mbarrier.expect(ready, KEYS * desc.block_type.shape[1] * 2)
    last_block = (length - 1) // BLOCK_SIZE
    for part in gl.static_range(KEYS // PART):
        key = first_key + part * PART
        block = gl.load(table + gl.minimum(key // BLOCK_SIZE, last_block))
        row = (block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        _fetch(desc, [row, 0], ready, tile.slice(part * PART, PART, 0))


@gluon.jit
def _attend(
    half: gl.constexpr,
    work,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The part of a group of four warps: the attention of 64 rows."""
    q_ptr, out_ptr, queries, ring, place, strides, scale = work
    keys, keys_ready, keys_free, values, values_ready, _ = ring
    begin, first_token, count, length, head, num_tiles, masked = place
    ROWS: gl.constexpr = queries.shape[1]
    DIM: gl.constexpr = queries.shape[2]
    KEYS: gl.constexpr = keys.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])

    q = queries.index(half)
    _load_queries(q_ptr, q, begin, first_token, count, head, half * ROWS, strides, GROUP, TOKENS)
    row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    position = length - count + first_token + row // GROUP
    zero = gl.zeros([ROWS, KEYS], gl.float32, layout)
    acc = gl.zeros([ROWS, DIM], gl.float32, acc_layout)
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))

    mbarrier.wait(keys_ready.index(0), 0)
    scores = warpgroup_mma(q, keys.index(0).permute((1, 0)), zero, use_acc=False)
    mbarrier.arrive(keys_free.index(0), count=1)
    first_key = (num_tiles - 1) * KEYS
    weights, top, total, _ = _softmax(
        scores, top, total, scale, first_key, position, values.dtype, acc_layout, True
    )
    if first_key + KEYS > length:
        mbarrier.wait(values_ready.index(0), 0)
        _clear_tail(values.index(0), length - first_key)
    for index in range(1, masked):
        weights, acc, top, total = _step(
            index, num_tiles, q, ring, weights, acc, top, total, scale, position, zero, STAGES, True
        )
    for index in range(gl.maximum(masked, 1), num_tiles):
        weights, acc, top, total = _step(
            index, num_tiles, q, ring, weights, acc, top, total, scale, position, zero, STAGES, False
        )
    stage = (num_tiles - 1) % STAGES
    mbarrier.wait(values_ready.index(stage), (num_tiles - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, values.index(stage), acc)

    row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, acc_layout))
    token = first_token + row // GROUP
    live = (row < TOKENS * GROUP) & (token < count)
    out_row = ((begin + token).to(gl.int64) * HEADS + head + row % GROUP) * DIM
    column = gl.arange(0, DIM, gl.SliceLayout(0, acc_layout))
    result = acc / gl.convert_layout(total, gl.SliceLayout(1, acc_layout))[:, None]
    gl.store(out_ptr + out_row[:, None] + column[None, :], result.to(values.dtype), mask=live[:, None])


@gluon.jit
def _load_queries(
    q_ptr, q, begin, first_token, count, head, first_row, strides, GROUP: gl.constexpr, TOKENS: gl.constexpr
):
    """The queries of a group's rows into its memory; rows that stand for none are zero."""
    DIM: gl.constexpr = q.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    q_token, q_head = strides
    row = first_row + gl.arange(0, q.shape[0], gl.SliceLayout(1, layout))
    token = first_token + row // GROUP
    live = (row < TOKENS * GROUP) & (token < count)
    place = (begin + token).to(gl.int64) * q_token + (head + row % GROUP) * q_head
    column = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    q.store(gl.load(q_ptr + place[:, None] + column[None, :], mask=live[:, None], other=0.0))
    # Products read memory by another way than stores write it.
    fence_async_shared()


@gluon.jit
def _clear_tail(tile, live):
    """Zero all but the first ``live`` rows of a tile of values: a weight of zero doesn't make up for a NaN there.

    Both groups do so, each before its own product; they write the same.
    """
    DIM: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    found = tile.load(layout)
    tile.store(gl.where((row < live)[:, None], found, gl.zeros_like(found)))
    fence_async_shared()


@gluon.jit
def _step(
    index,
    num_tiles,
    q,
    ring,
    weights,
    acc,
    top,
    total,
    scale,
    position,
    zero,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """The scores of a tile and their softmax, and the values of the tile before it, weighed."""
    keys, keys_ready, keys_free, values, values_ready, values_free = ring
    acc_layout: gl.constexpr = acc.type.layout
    stage = index % STAGES
    before = (index - 1) % STAGES
    mbarrier.wait(keys_ready.index(stage), index // STAGES & 1)
    scores = warpgroup_mma(q, keys.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(values_ready.index(before), (index - 1) // STAGES & 1)
    weighed = warpgroup_mma(weights, values.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(keys_free.index(stage), count=1)
    first_key = (num_tiles - 1 - index) * keys.shape[1]
    next_weights, top, total, decay = _softmax(
        scores, top, total, scale, first_key, position, values.dtype, acc_layout, MASKED
    )
    acc, weights = warpgroup_mma_wait(0, deps=[weighed, weights])
    mbarrier.arrive(values_free.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]
    return next_weights, acc, top, total


@gluon.jit
def _softmax(
    scores,
    top,
    total,
    scale,
    first_key,
    position,
    dtype: gl.constexpr,
    acc_layout: gl.constexpr,
    MASKED: gl.constexpr,
):
    """A tile of scores into the running softmax: its weights, as a product takes them, the new maximum and sum, and
    the factor for what was summed up before."""
    if MASKED:
        key = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    # Scaled together with the subtraction below, each score takes one operation.
    higher = gl.maximum(top, gl.max(scores, axis=1) * scale)
    base = higher
    if MASKED:
        # A row that has seen nothing yet has no maximum to subtract.
        base = gl.where(higher == float("-inf"), 0.0, higher)
    weights = gl.exp2(scores * scale - base[:, None])
    decay = gl.exp2(top - base)
    total = total * decay + gl.sum(weights, axis=1)
    weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, acc_layout, 2))
    return weights, higher, total, decay
