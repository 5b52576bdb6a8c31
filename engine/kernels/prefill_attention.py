"""Causal attention of long prompts over a paged KV cache, for Hopper GPUs.

The general kernel in :mod:`engine.kernels.paged_attention` runs matmul, softmax and matmul one after the
other, and each of its tiles of 64 rows reads all keys. This kernel specialises warps (Shah et al.,
FlashAttention-3, 2024): one warp loads tiles of keys and values, KV block by KV block, through tensor memory
descriptors (TMA); two groups of four warps with 64 rows each share the loaded tiles. A group runs the softmax
of one tile while its next score matmul and its last value matmul are in flight, and while the other group
uses the tensor cores.

Prompts of a few hundred tokens have too few tiles for all SMs to be busy to the end, and the last tile of a prompt
sees all its keys. With *pairs* a program has a tile of 64 rows from the prompt's end and one from its start: all
programs of a prompt then have nearly the same work. The group with fewer keys lets the others pass.

This needs control over layouts, barriers and asynchronous matmuls, which Gluon has and Triton's language has
not. Gluon has no interpreter, so the tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.device import is_hopper
from engine.kernels.launch import launch
from engine.kernels.paged import LOG2E, KVCache, query_tiles
from engine.kernels.ring import barriers, buffers, clear_tail, tma_load

#: Rows of a program, half of them for each compute group; keys per tile; tiles in shared memory at a time.
_ROWS, _KEYS, _STAGES = 128, 128, 2
#: Registers per thread: 168 for three groups of four warps use all registers of an SM. The compute groups
#: take what the load warp gives up.
_REGISTERS, _COMPUTE_REGISTERS, _LOAD_REGISTERS = 168, 240, 24


def supports(q: torch.Tensor, cache: KVCache) -> bool:
    """Return whether the kernel can compute the attention of ``q`` ``(T, Hq, D)`` over ``cache``."""
    group, dim = q.shape[1] // cache.kv_heads, q.shape[2]
    fits = dim in (16, 32, 64, 128) and group <= _ROWS // 2 and cache.block_size >= 8
    # Tensor descriptors know one distance between rows.
    fits = fits and cache.keys.is_contiguous()
    return fits and q.element_size() == 2 and q.dtype == cache.keys.dtype and is_hopper(q.device)


def prefill_attention_gluon(q, cache, meta, *, scale, paired, out=None):
    """See :func:`engine.kernels.dispatch.paged_attention`; for what :func:`supports` admits, without a window.

    Args:
        paired: a program has two tiles of 64 rows, which don't share all keys, in place of one of 128.
    """
    tokens, heads, dim = q.shape
    kv_heads, sequences = cache.kv_heads, meta.seq_lens.shape[0]
    assert q.stride(-1) == 1 and meta.block_tables.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous()
    if tokens == 0 or sequences == 0:
        return out
    group = heads // kv_heads
    tokens_per_tile = _ROWS // 2 // group * 2 if paired else _ROWS // group
    launch(
        _prefill_kernel, (query_tiles(tokens, sequences, tokens_per_tile), kv_heads),
        q_ptr=q, k_desc=_describe(cache.keys), v_desc=_describe(cache.values), table_ptr=meta.block_tables,
        query_start_ptr=meta.query_start, seq_lens_ptr=meta.seq_lens, out_ptr=out,
        sequences=sequences, scale=scale * LOG2E,
        q_token=q.stride(0), q_head=q.stride(1), table_row=meta.block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_SIZE=cache.block_size,
        KEYS=_KEYS, TOKENS=tokens_per_tile, STAGES=_STAGES, PAIRED=paired,
        COMPUTE_REGISTERS=_COMPUTE_REGISTERS, LOAD_REGISTERS=_LOAD_REGISTERS,
        num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
    return out


def _describe(cache: torch.Tensor) -> TensorDescriptor:
    """Describe keys or values as rows of one token and head. A copy takes the rows of one KV block, or of one
    tile if that is smaller."""
    descriptor = _DESCRIPTORS.get(cache)
    if descriptor is None:
        block_size, dim = cache.shape[2:]
        box = [min(block_size, _KEYS), dim]
        dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[cache.dtype]
        layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
        descriptor = _DESCRIPTORS[cache] = TensorDescriptor.from_tensor(cache.view(-1, dim), box, layout)
    return descriptor


#: Descriptors by cache tensor, for as long as the tensor lives: creating them is most of the host time of a
#: launch.
_DESCRIPTORS = WeakTensorKeyDictionary()


# ``sequences`` differs between batch sizes; specialising on it would compile the kernel again at start-up.
@gluon.jit(do_not_specialize=["sequences"])
def _prefill_kernel(
    q_ptr, k_desc, v_desc, table_ptr, query_start_ptr, seq_lens_ptr, out_ptr,
    sequences, scale, q_token, q_head, table_row,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    KEYS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    PAIRED: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per query tile, or pair of tiles, and KV head. TOKENS: query tokens of a program."""
    # A prompt's last tile has the most keys: started first, it does not run alone at the end.
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    kv_head = gl.program_id(1)
    sequence, begin, first_token, count, length = _find_tile(
        query_start_ptr, seq_lens_ptr, tile, sequences, TOKENS
    )
    if first_token < count:
        OF_TILE: gl.constexpr = TOKENS // 2 if PAIRED else TOKENS
        last_token = first_token
        if PAIRED:
            # The first group has the tile nearer to the prompt's end.
            number = first_token // TOKENS
            first_token = number * OF_TILE
            last_token = (gl.cdiv(count, OF_TILE) - 1 - number) * OF_TILE
        # Tiles of keys that some row of the first group sees, processed from the last to the first.
        num_tiles = _num_tiles(last_token, count, length, KEYS, OF_TILE)
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        queries = buffers(2, 64, DIM, dtype)
        keys = buffers(STAGES, KEYS, DIM, dtype)
        values = buffers(STAGES, KEYS, DIM, dtype)
        # Ready: the tile has been loaded. Free: both compute groups have finished with it.
        keys_ready, keys_free = barriers(STAGES, 1), barriers(STAGES, 2)
        values_ready, values_free = barriers(STAGES, 1), barriers(STAGES, 2)
        ring = (keys, keys_ready, keys_free, values, values_ready, values_free)
        first_head = kv_head * GROUP
        span = (begin, count, length, first_head, num_tiles)
        table = table_ptr + sequence.to(gl.int64) * table_row
        work = (q_ptr, out_ptr, queries, ring, span, (q_token, q_head), scale)
        first: gl.constexpr = 0
        second: gl.constexpr = 1
        gl.warp_specialize(
            [
                (_attend, (first, work, last_token, KV_HEADS * GROUP, GROUP, OF_TILE, STAGES, PAIRED)),
                (_attend, (second, work, first_token, KV_HEADS * GROUP, GROUP, OF_TILE, STAGES, PAIRED)),
                (
                    _load_tiles,
                    (k_desc, v_desc, table, ring, length, kv_head, num_tiles, KV_HEADS, BLOCK_SIZE, STAGES),
                ),
            ],
            [4, 1],
            [COMPUTE_REGISTERS, LOAD_REGISTERS],
        )


@gluon.jit
def _find_tile(query_start_ptr, seq_lens_ptr, tile, sequences, TOKENS: gl.constexpr):
    """Do what :func:`engine.kernels.paged.find_tile` does, by looking at 64 sequences at a time: their numbers come in
    the time of one load. A search would wait for one load after the other, and the caches have lost the first."""
    # All warps look at the same sequences, so that none waits for another.
    lane = gl.arange(0, 64, gl.BlockedLayout([2], [32], [gl.num_warps()], [0]))
    low, begin, end, length = 0, 0, 0, 0
    for first in range(0, sequences, 64):
        sequence = first + lane
        start = gl.load(query_start_ptr + sequence, mask=sequence < sequences, other=0)
        stop = gl.load(query_start_ptr + sequence + 1, mask=sequence < sequences, other=0)
        seq_len = gl.load(seq_lens_ptr + sequence, mask=sequence < sequences, other=0)
        reached = (sequence < sequences) & (start // TOKENS + sequence <= tile)
        passed = (sequence + 1 < sequences) & (stop // TOKENS + sequence + 1 <= tile)
        found = reached & (passed == 0)
        low += gl.sum(gl.where(found, sequence, 0), axis=0)
        begin += gl.sum(gl.where(found, start, 0), axis=0)
        end += gl.sum(gl.where(found, stop, 0), axis=0)
        length += gl.sum(gl.where(found, seq_len, 0), axis=0)
    return low, begin, (tile - begin // TOKENS - low) * TOKENS, end - begin, length


@gluon.jit
def _num_tiles(first_token, count, length, KEYS: gl.constexpr, TOKENS: gl.constexpr):
    """The number of tiles of keys that some row of a tile of rows sees."""
    return gl.cdiv(length - count + gl.minimum(first_token + TOKENS, count), KEYS)


@gluon.jit
def _load_tiles(
    k_desc, v_desc, table, ring, length, kv_head, num_tiles,
    KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load tiles of keys and values into the ring of shared memory buffers; run by one warp."""
    keys, keys_ready, keys_free, values, values_ready, values_free = ring
    for index in range(num_tiles):
        stage = index % STAGES
        # Before its first phase a barrier counts as having completed the phase before.
        phase = (index // STAGES & 1) ^ 1
        first_key = (num_tiles - 1 - index) * keys.shape[1]
        mbarrier.wait(keys_free.index(stage), phase)
        _load_tile(
            k_desc, table, keys.index(stage), keys_ready.index(stage), first_key, length, kv_head,
            KV_HEADS, BLOCK_SIZE,
        )  # fmt: skip
        mbarrier.wait(values_free.index(stage), phase)
        _load_tile(
            v_desc, table, values.index(stage), values_ready.index(stage), first_key, length, kv_head,
            KV_HEADS, BLOCK_SIZE,
        )  # fmt: skip


@gluon.jit
def _load_tile(
    desc, table, tile, ready, first_key, length, kv_head, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr
):  # fmt: skip
    """Load the tile of keys, or values, from ``first_key`` on. Rows beyond the last KV block repeat that
    block."""
    KEYS: gl.constexpr = tile.shape[0]
    BOX: gl.constexpr = desc.block_type.shape[0]
    mbarrier.expect(ready, KEYS * desc.block_type.shape[1] * 2)
    last_block = (length - 1) // BLOCK_SIZE
    for part in gl.static_range(KEYS // BOX):
        key = first_key + part * BOX
        block = gl.load(table + gl.minimum(key // BLOCK_SIZE, last_block))
        row = (block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        tma_load(desc, [row, 0], ready, tile.slice(part * BOX, BOX, 0))


@gluon.jit
def _attend(
    half: gl.constexpr, work, first_token,
    HEADS: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    """Compute the attention of 64 rows; run by one compute group (four warps).

    Args:
        half: which 64 rows of the program.
        first_token: of the group's tile of rows.
        TOKENS: query tokens of a tile.
    """
    ring, span = work[3], work[4]
    keys, keys_ready, keys_free, _, values_ready, values_free = ring
    _, count, length, _, all_tiles = span
    KEYS: gl.constexpr = keys.shape[1]
    num_tiles = _num_tiles(first_token, count, length, KEYS, TOKENS)
    if PAIRED and half == 1:
        # The first group has a tile in the middle, which has no other.
        number = first_token // TOKENS
        num_tiles = gl.where(gl.cdiv(count, TOKENS) == 2 * number + 1, 0, num_tiles)
    # Tiles that only the other group sees come first.
    skipped = all_tiles - num_tiles
    for step in range(skipped):
        mbarrier.wait(keys_ready.index(step % STAGES), step // STAGES & 1)
        mbarrier.arrive(keys_free.index(step % STAGES), count=1)
        mbarrier.wait(values_ready.index(step % STAGES), step // STAGES & 1)
        mbarrier.arrive(values_free.index(step % STAGES), count=1)
    if num_tiles > 0:
        FIRST: gl.constexpr = 0 if PAIRED else half * 64
        _attend_tiles(half, work, first_token, num_tiles, FIRST, HEADS, GROUP, TOKENS, STAGES, PAIRED)


@gluon.jit
def _attend_tiles(
    half: gl.constexpr, work, first_token, num_tiles, FIRST: gl.constexpr,
    HEADS: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Compute the attention of rows ``FIRST .. FIRST + 63`` of a tile over its ``num_tiles`` tiles of keys."""
    q_ptr, out_ptr, queries, ring, span, strides, scale = work
    keys, keys_ready, keys_free, values, values_ready, _ = ring
    begin, count, length, first_head, all_tiles = span
    ROWS: gl.constexpr = queries.shape[1]
    DIM: gl.constexpr = queries.shape[2]
    KEYS: gl.constexpr = keys.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    q = queries.index(half)
    _load_queries(q_ptr, q, begin, first_token, count, first_head, FIRST, strides, GROUP, TOKENS)
    row = FIRST + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    position = length - count + first_token + row // GROUP
    zero = gl.zeros([ROWS, KEYS], gl.float32, layout)
    acc = gl.zeros([ROWS, DIM], gl.float32, acc_layout)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))

    # The first ``masked`` tiles need a mask: not every row sees them in full.
    masked = num_tiles - (length - count + first_token + 1) // KEYS
    skipped = all_tiles - num_tiles
    stage = skipped % STAGES
    mbarrier.wait(keys_ready.index(stage), skipped // STAGES & 1)
    scores = warpgroup_mma(q, keys.index(stage).permute((1, 0)), zero, use_acc=False)
    mbarrier.arrive(keys_free.index(stage), count=1)
    first_key = (num_tiles - 1) * KEYS
    probs, row_max, row_sum, _ = _softmax(
        scores, row_max, row_sum, scale, first_key, position, values.dtype, acc_layout, True
    )
    if first_key + KEYS > length:
        mbarrier.wait(values_ready.index(stage), skipped // STAGES & 1)
        clear_tail(values.index(stage), length - first_key)
    for index in range(skipped + 1, skipped + masked):
        probs, acc, row_max, row_sum = _step(
            index,
            all_tiles,
            q,
            ring,
            probs,
            acc,
            row_max,
            row_sum,
            scale,
            position,
            zero,
            STAGES,
            PAIRED,
            True,
        )
    for index in range(skipped + gl.maximum(masked, 1), all_tiles):
        probs, acc, row_max, row_sum = _step(
            index,
            all_tiles,
            q,
            ring,
            probs,
            acc,
            row_max,
            row_sum,
            scale,
            position,
            zero,
            STAGES,
            PAIRED,
            False,
        )
    stage = (all_tiles - 1) % STAGES
    mbarrier.wait(values_ready.index(stage), (all_tiles - 1) // STAGES & 1)
    acc = warpgroup_mma(probs, values.index(stage), acc)

    row = FIRST + gl.arange(0, ROWS, gl.SliceLayout(1, acc_layout))
    token = first_token + row // GROUP
    valid = (row < TOKENS * GROUP) & (token < count)
    out_row = ((begin + token).to(gl.int64) * HEADS + first_head + row % GROUP) * DIM
    column = gl.arange(0, DIM, gl.SliceLayout(0, acc_layout))
    result = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, acc_layout))[:, None]
    gl.store(out_ptr + out_row[:, None] + column[None, :], result.to(values.dtype), mask=valid[:, None])


@gluon.jit
def _load_queries(
    q_ptr, q, begin, first_token, count, first_head, first_row, strides,
    GROUP: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Load the queries of a compute group into its buffer; rows without a query become zero."""
    DIM: gl.constexpr = q.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    q_token, q_head = strides
    row = first_row + gl.arange(0, q.shape[0], gl.SliceLayout(1, layout))
    token = first_token + row // GROUP
    valid = (row < TOKENS * GROUP) & (token < count)
    offset = (begin + token).to(gl.int64) * q_token + (first_head + row % GROUP) * q_head
    column = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    q.store(gl.load(q_ptr + offset[:, None] + column[None, :], mask=valid[:, None], other=0.0))
    # Tensor cores read shared memory through the async proxy, which does not see plain stores without a
    # fence.
    fence_async_shared()


@gluon.jit
def _step(
    index, num_tiles, q, ring, probs, acc, row_max, row_sum, scale, position, zero,
    STAGES: gl.constexpr, PAIRED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Compute the scores and softmax of one tile, and add the values of the tile before it.

    Args:
        probs: softmax weights of the tile before.
        zero: accumulator of the score matmul, kept in registers.
    """
    keys, keys_ready, keys_free, values, values_ready, values_free = ring
    acc_layout: gl.constexpr = acc.type.layout
    stage = index % STAGES
    before = (index - 1) % STAGES
    mbarrier.wait(keys_ready.index(stage), index // STAGES & 1)
    scores = warpgroup_mma(q, keys.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(values_ready.index(before), (index - 1) // STAGES & 1)
    summed = warpgroup_mma(probs, values.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(keys_free.index(stage), count=1)
    first_key = (num_tiles - 1 - index) * keys.shape[1]
    next_probs, row_max, row_sum, decay = _softmax(
        scores, row_max, row_sum, scale, first_key, position, values.dtype, acc_layout, MASKED
    )
    if PAIRED:
        # ptxas moves the next wait before the softmax, but not across the branch of this one. Tiles of 128 rows, whose
        # groups are both busy, take longer with it: it also keeps the values' buffer for longer.
        mbarrier.wait(values_ready.index(before), (index - 1) // STAGES & 1)
    acc, probs = warpgroup_mma_wait(0, deps=[summed, probs])
    mbarrier.arrive(values_free.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]
    return next_probs, acc, row_max, row_sum


@gluon.jit
def _softmax(
    scores, row_max, row_sum, scale, first_key, position,
    dtype: gl.constexpr, acc_layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add a tile of scores to the online softmax.

    Returns:
        The tile's softmax weights as an operand of the value matmul, the new maximum and sum, and the factor
        for the values summed so far.
    """
    if MASKED:
        key = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    # Scaling here and in the subtraction below costs one multiply-add per score.
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale)
    base = new_max
    if MASKED:
        # For a row that has seen no key yet, -inf - -inf would be NaN.
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    probs = gl.exp2(scores * scale - base[:, None])
    decay = gl.exp2(row_max - base)
    row_sum = row_sum * decay + gl.sum(probs, axis=1)
    probs = gl.convert_layout(probs.to(dtype), gl.DotOperandLayout(0, acc_layout, 2))
    return probs, new_max, row_sum, decay
