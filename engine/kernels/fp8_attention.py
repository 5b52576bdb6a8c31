"""Attention of a decode step over keys and values in fp8, for Hopper GPUs: half the bytes in about half the time.

It computes what :mod:`engine.kernels.decode_attention` does. There the compiler passes numbers through shared memory
and converts them one after the other, which takes longer than reading them. Here a thread loads 16 bytes of a key, or
of each of two values, straight into the registers that it multiplies them from. Two numbers become float16 by one
instruction, exactly. Only the order in which a product adds up decides which dimensions are neighbours, so:

* A thread's words of a key are four numbers each. The first two of all words are one product's inputs, the other two
  are those of a second one; queries are loaded in that order.
* Of values a product takes pairs of keys. A word of one and a word of the next one are four such pairs, which four
  products take, so each has a quarter of the dimensions.
* Keys and values are left operands of 16 rows, queries and probabilities right ones of 8 columns: of 16 rows of
  queries most would be empty. Probabilities come out of one product as the transpose of what the next one takes.

Each warp of a program has keys and a softmax of its own; they are merged at the end. Gluon has no interpreter, so the
tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from engine.kernels.decode_attention import MAX_SPLITS, decode_arguments
from engine.kernels.device import is_hopper, num_sms
from engine.kernels.fp8 import round_to_fp8
from engine.kernels.fp8_mma import halves_of_words
from engine.kernels.launch import is_compiling, launch
from engine.kernels.paged import KVCache, beside_fp8, capped
from engine.kernels.pdl import launch_dependents, pdl_options, wait_for_previous
from engine.kernels.registers import interleaved
from engine.kernels.ring import block_barrier
from engine.kernels.rms_norm import scaled_by_norm
from engine.kernels.rotary import load_rotation, rotated

#: Most query heads of a KV head.
_MAX_GROUP = 16
#: Keys that a warp handles at a time.
_KEYS = 16
#: Registers of a thread, and warps that fit on an SM then: of up to eight query heads, and of more. With 168 eight
#: heads' keys are read more slowly.
_FEW_ROWS, _MANY_ROWS = (128, 16), (168, 12)
#: Without PDL: words on their way need room in L1, of which there is little on an SM as long as it runs a program with
#: much shared memory. Programs that fill the GPU read faster if they start after those. The next kernel may start as
#: soon as all of them have: where an SM's have ended it loads weights while others still run.
_ALONE: dict[str, Any] = {"PDL": False}
_launch_dependents = gluon.jit(launch_dependents.fn)
_wait_for_previous = gluon.jit(wait_for_previous.fn)
_round_to_fp8 = gluon.jit(round_to_fp8.fn)
_beside_fp8 = gluon.jit(beside_fp8.fn)
_capped = gluon.jit(capped.fn)
_scaled_by_norm = gluon.jit(scaled_by_norm.fn)
_load_rotation = gluon.jit(load_rotation.fn)
_rotated = gluon.jit(rotated.fn)


def supports(q: torch.Tensor, cache: KVCache) -> bool:
    """Return whether the kernel should attend with ``q`` ``(S, Hq, D)`` to ``cache``."""
    _, heads, dim = q.shape
    known = cache.is_fp8 and q.dtype in (torch.bfloat16, torch.float16) and dim in (64, 128)
    return known and heads <= _MAX_GROUP * cache.kv_heads and cache.block_size > 1 and is_hopper(q.device)


def choose_warps(programs: int, resident: int) -> int:
    """Return the warps of a program. A warp alone reads fastest; where its keys would have to be split for the SMs to
    be full, two in one program need half the splits.

    Args:
        programs: sequences times KV heads.
        resident: warps that fit on the GPU.
    """
    return 1 if 2 * programs >= resident else 2


def num_splits(programs: int, warps: int, resident: int, max_seq_len: int) -> int:
    """Return the programs per sequence and KV head: as many as the GPU holds at once. See :func:`choose_warps`."""
    fitting = resident // (warps * max(programs, 1))
    return max(1, min(fitting, MAX_SPLITS, triton.cdiv(max_seq_len, _KEYS * warps)))


def decode_attention_gluon(
    q, k, v, positions, table, cache, meta, *, scale, norms=None, window=None, cap=None
):  # fmt: skip
    """See :func:`engine.kernels.dispatch.decode_attention`; for what :func:`supports` admits."""
    limits = {"scale": scale, "norms": norms, "window": window, "cap": cap}
    return _launch(q, k, v, positions, table, cache, meta, limits)


def single_attention_gluon(q, cache, meta, *, scale, window=None, cap=None, out=None):
    """Compute :func:`engine.kernels.dispatch.paged_attention` for the sequences that have one new token; for what
    :func:`supports` admits, and each token sees the keys up to its own. The rows of others are not written."""
    limits = {"scale": scale, "norms": None, "window": window, "cap": cap, "out": out}
    return _launch(q, None, None, None, None, cache, meta, limits)


def _launch(q, k, v, positions, table, cache, meta, limits: dict[str, Any]) -> torch.Tensor:
    sequences, kv_heads = len(meta.seq_lens), cache.kv_heads
    rows = 8 if q.shape[1] <= 8 * kv_heads else 16
    registers, warps_of_sm = _FEW_ROWS if rows == 8 else _MANY_ROWS
    programs, resident = sequences * kv_heads, warps_of_sm * num_sms(q.device)
    chosen = choose_warps(programs, resident)
    kinds = [(chosen, num_splits(programs, chosen, resident, meta.max_seq_len))]
    mixed = meta.max_query_len > 1
    if mixed and is_compiling():
        # Compile the kernels for other numbers of sequences too: steps that are not captured have any.
        kinds = [*product((1, 2), (1, 2))]
    for warps, splits in kinds:
        out, arguments = decode_arguments(q, k, v, positions, table, cache, meta, splits, **limits)
        if sequences > 0:
            launch(
                _fp8_decode_kernel, (sequences, kv_heads, splits), **arguments, query_start_ptr=meta.query_start,
                MIXED=mixed, ROWS=rows, KEYS=_KEYS, WARPS=warps, num_warps=warps, maxnreg=registers,
                **(_ALONE if warps == 1 else pdl_options(q)),
            )  # fmt: skip
    return out


@gluon.constexpr_function
def _bases(count, first, axis, rank):
    """Return the bases of ``count`` places, a power of two, along an axis of a layout, ``first`` apart."""
    bases = []
    while count > 1:
        bases.append([first if index == axis else 0 for index in range(rank)])
        first, count = 2 * first, count // 2
    return bases


@gluon.constexpr_function
def _value_layout(warps, words, pairs):
    """Layout of words ``(W, 8, words, pairs of keys)``: a thread has all ``words`` of its eighth of a value."""
    registers = _bases(words, 1, 2, 4) + _bases(pairs // 4, 4, 3, 4)
    lanes = _bases(4, 1, 3, 4) + _bases(8, 1, 1, 4)
    return gl.DistributedLinearLayout(registers, lanes, _bases(warps, 1, 0, 4), [], [warps, 8, words, pairs])


# ``splits`` differs between batch sizes; specialising on it would compile the kernel again at start-up.
@gluon.jit(do_not_specialize=["splits"])
def _fp8_decode_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, eps, offset, positions_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, table_ptr,
    seq_lens_ptr, out_ptr, partial_ptr, stats_ptr, counters_ptr, splits, scale, window,
    key_scale, value_scale, q_token, q_head, k_token, k_head, v_token, v_head, axis_stride, position_stride, angle_stride, table_row, query_start_ptr,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_STRIDE: gl.constexpr,
    BORROWED: gl.constexpr, NORM: gl.constexpr, OFFSET: gl.constexpr, LAST: gl.constexpr,
    HALF: gl.constexpr, SECTION: gl.constexpr, INTERLEAVED: gl.constexpr, ADJACENT: gl.constexpr,
    MIXED: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr, CAP: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program per sequence, KV head and split; arguments as in :mod:`engine.kernels.decode_attention`.

    Args:
        MIXED: sequences may have more new tokens, or none; of these nothing is computed.
        ROWS: a multiple of 8, not less than GROUP.
        KEYS: that a warp handles at a time, a multiple of 16.
    """
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    # Words of four numbers that a thread loads at once.
    WORDS: gl.constexpr = DIM // 32
    STEP: gl.constexpr = WARPS * KEYS
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    fp8: gl.constexpr = k_cache_ptr.dtype.element_ty
    _launch_dependents(WARPS == 1)
    sequence = gl.program_id(0).to(gl.int64)
    kv_head = gl.program_id(1)
    split = gl.program_id(2)
    # The previous kernel writes q, k and v. What is read before the wait was there before this pass.
    newest = gl.load(seq_lens_ptr + sequence) - 1
    if not BORROWED:
        slot = gl.load(slot_ptr + sequence)
    token = sequence
    single = sequence >= 0
    if MIXED:
        token = gl.load(query_start_ptr + sequence).to(gl.int64)
        single = gl.load(query_start_ptr + sequence + 1) - token == 1
    # This program's share of the visible keys in the cache; the first ``used`` splits have one.
    cached = gl.where(single, newest + 1 if BORROWED else newest, 0)
    start = 0
    if WINDOW:
        start = gl.maximum(newest - window + 1, 0) // STEP * STEP
    share = gl.maximum(gl.cdiv(gl.cdiv(cached - start, STEP), splits), 1) * STEP
    used = gl.where(single, gl.maximum(gl.cdiv(cached - start, share), 1), 0)
    start = start + split * share
    end = gl.minimum(start + share, cached)
    last = gl.maximum((end - 1) // STEP * STEP, start)

    head_place = kv_head * BLOCK_SIZE * DIM
    table = table_ptr + sequence * table_row
    keys = _keys(k_cache_ptr + head_place, table, DIM, BLOCK_SIZE, SUMS, KEYS)
    values = _values(v_cache_ptr + head_place, table, DIM, BLOCK_SIZE, SUMS, KEYS)
    if BORROWED:
        # An earlier kernel of this pass has written the last keys.
        _wait_for_previous(PDL)
    # The last tile, which may have less keys, comes first: as a rule it has been loaded when the previous kernel ends.
    k_place = _place(
        keys, _load_blocks(keys, last, end, BLOCK_SIZE), last, BLOCK_SIZE, BLOCK_STRIDE, DIM, STEP
    )
    v_place = _place(
        values, _load_blocks(values, last, end, BLOCK_SIZE), last, BLOCK_SIZE, BLOCK_STRIDE, DIM, STEP
    )
    k_tile = gl.load(k_place, mask=last + keys[3] < end, other=0)
    even = gl.load(v_place, mask=last + values[3] < end, other=0)
    odd = gl.load(v_place + DIM // 4, mask=last + values[3] + 1 < end, other=0)
    # Each tile's blocks are known when its turn comes.
    blocks = (_load_blocks(keys, start, last, BLOCK_SIZE), _load_blocks(values, start, last, BLOCK_SIZE))
    QUERIES: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2 * WORDS)
    OF_QUERIES: gl.constexpr = gl.SliceLayout(0, QUERIES)
    pair = gl.arange(0, DIM // 2, layout=gl.SliceLayout(1, OF_QUERIES))[:, None]
    column = pair // 2 * 4 + pair % 2
    if HALF > 0:
        first_rotation = _load_rotation(
            column, positions_ptr, cos_ptr, sin_ptr, token, axis_stride, position_stride, angle_stride, dtype,
            HALF, SECTION, INTERLEAVED, ADJACENT,
        )  # fmt: skip
        second_rotation = _load_rotation(
            column + 2, positions_ptr, cos_ptr, sin_ptr, token, axis_stride, position_stride, angle_stride, dtype,
            HALF, SECTION, INTERLEAVED, ADJACENT,
        )  # fmt: skip
        rotation = (first_rotation, second_rotation)
    else:
        rotation = column
    if not BORROWED:
        _wait_for_previous(PDL)
    if split >= used:
        return

    # Queries; the new token's key and value go to the cache, and are the first of the first split's softmax.
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, OF_QUERIES))[None, :]
    q_row = q_ptr + token * q_token + (kv_head * GROUP + row) * q_head
    in_group = (row < GROUP) & (pair >= 0)
    q0, q1 = _load_heads(
        q_row, q_norm_ptr, column, rotation, in_group, eps, offset, DIM, NORM, OFFSET, LAST, HALF > 0
    )

    OF_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    row_max = gl.full([WARPS, ROWS], float("-inf"), gl.float32, OF_ROW)
    sums = gl.zeros([WARPS, KEYS, ROWS], gl.float32, SUMS)
    zeros = gl.zeros([WARPS, DIM // 4, ROWS], gl.float32, SUMS)
    acc = (zeros, zeros, zeros, zeros)
    if not BORROWED:
        k_row = k_ptr + sequence * k_token + kv_head * k_head
        k0, k1 = _load_heads(
            k_row, k_norm_ptr, column, rotation, pair >= 0, eps, offset, DIM, NORM, OFFSET, LAST, HALF > 0
        )
        # Attention sees the rounded ones, as later steps do.
        k0, k1 = _round_to_fp8(k0, key_scale, fp8), _round_to_fp8(k1, key_scale, fp8)
        writes = (split == 0) & (slot >= 0)
        slot_place = slot // BLOCK_SIZE * BLOCK_STRIDE + head_place + slot % BLOCK_SIZE * DIM
        gl.store(k_cache_ptr + slot_place + column, k0, mask=writes & (pair >= 0))
        gl.store(k_cache_ptr + slot_place + column + 2, k1, mask=writes & (pair >= 0))
        products = q0.to(gl.float32) * k0.to(gl.float32) + q1.to(gl.float32) * k1.to(gl.float32)
        score = gl.convert_layout(gl.sum(products, axis=0) * scale, gl.SliceLayout(0, OF_ROW))[None, :]
        if CAP > 0:
            score = _capped(score, 1.0, CAP)
        alone = (
            gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None] + split == 0
        )
        first_key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))[None, :, None] == 0
        sums += gl.where(alone & first_key, 1.0, 0.0)
        word = gl.arange(0, DIM // 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))[None, :, None]
        acc = ()
        for number in gl.static_range(4):
            dim = _dimension(word, WORDS, number)
            new_v = gl.load(v_ptr + sequence * v_token + kv_head * v_head + dim)
            new_v = _round_to_fp8(new_v, value_scale, fp8)
            gl.store(v_cache_ptr + slot_place + dim, new_v, mask=writes & (dim >= 0))
            acc = acc + (zeros + gl.where(alone, new_v.to(gl.float32), 0.0),)
        row_max = gl.where(
            gl.arange(0, WARPS, layout=gl.SliceLayout(1, OF_ROW))[:, None] + split == 0, score, row_max
        )
    everywhere = gl.zeros([WARPS, DIM // 2, ROWS], gl.float16, QUERIES)
    queries = (_beside_fp8(q0)[None, :, :] + everywhere, _beside_fp8(q1)[None, :, :] + everywhere)

    state = (acc, row_max, sums)
    tile = (k_tile, even, odd)
    visible = (end, newest, window)
    state, tile, blocks = _attend(
        state, queries, tile, keys, values, blocks, last, start, last, visible, scale, BLOCK_SIZE, BLOCK_STRIDE, DIM,
        SUMS, True, WINDOW, CAP,
    )  # fmt: skip
    for first in range(start, last, STEP):
        state, tile, blocks = _attend(
            state, queries, tile, keys, values, blocks, first, first + STEP, last, visible, scale, BLOCK_SIZE,
            BLOCK_STRIDE, DIM, SUMS, WINDOW, WINDOW, CAP,
        )  # fmt: skip

    # Merge the warps' softmaxes.
    acc, row_max, sums = state
    top = gl.max(row_max, axis=0)
    weight = gl.exp2(row_max - top[None, :])
    row_sum = gl.sum(gl.sum(sums, axis=1) * weight, axis=0)
    weight = weight[:, None, :]
    RESULT: gl.constexpr = gl.SliceLayout(0, SUMS)
    total = gl.convert_layout(row_sum, gl.SliceLayout(0, RESULT), assert_trivial=True)[None, :]
    out_row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, RESULT))[None, :]
    out_word = gl.arange(0, DIM // 4, layout=gl.SliceLayout(1, RESULT))[:, None]
    first_head = sequence * (KV_HEADS * GROUP) + kv_head * GROUP
    out_head = token * (KV_HEADS * GROUP) + kv_head * GROUP
    out_part = (first_head + out_row) * splits + split
    for number in gl.static_range(4):
        column = _dimension(out_word, WORDS, number)
        in_group = (out_row < GROUP) & (column >= 0)
        result = gl.sum(acc[number] * weight, axis=0)
        if used == 1:
            scaled = result / total * value_scale
            gl.store(out_ptr + (out_head + out_row) * DIM + column, scaled.to(dtype), mask=in_group)
        else:
            gl.store(partial_ptr + out_part * DIM + column, result, mask=in_group)
    if SPLIT:
        if used > 1:
            stat_row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, OF_ROW))
            part = (first_head + stat_row) * splits + split
            gl.store(stats_ptr + part * 2, top, mask=stat_row < GROUP)
            gl.store(stats_ptr + part * 2 + 1, row_sum, mask=stat_row < GROUP)
            # All threads must have written before the program counts itself as finished.
            block_barrier()
            counter = counters_ptr + sequence * KV_HEADS + kv_head
            if gl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                gl.store(counter, 0)
                _merge(
                    partial_ptr + first_head * splits * DIM, stats_ptr + first_head * splits * 2,
                    out_ptr + out_head * DIM, splits, used, value_scale, GROUP, DIM, ROWS, WARPS,
                )  # fmt: skip


@gluon.jit
def _keys(
    cache_ptr, table, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, SUMS: gl.constexpr, KEYS: gl.constexpr
):
    """Return where a tile's keys come from, as words ``(W, KEYS, D / 4)`` of four numbers, a left operand's.

    Returns:
        A pointer to the head in block 0, the sequence's row of the block tables, each word's place within its block,
        its key within the tile, and a key of each block that a warp needs.
    """
    WORDS: gl.constexpr = gl.DotOperandLayout(0, SUMS, DIM // 32)
    WARPS: gl.constexpr = SUMS.warps_per_cta[0]
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None]
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None]
    word = gl.arange(0, DIM // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    key, first = warp * KEYS + key, warp * KEYS
    inside = key % BLOCK_SIZE * (DIM // 4) + word
    words = cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    return words, table, inside, key, first if BLOCK_SIZE >= KEYS else key


@gluon.jit
def _values(
    cache_ptr, table, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, SUMS: gl.constexpr, KEYS: gl.constexpr
):
    """Return where the values of a tile's even keys come from, as words ``(W, 8, D / 32, KEYS / 2)``; see
    :func:`_keys`. Those of odd keys lie behind them."""
    WARPS: gl.constexpr = SUMS.warps_per_cta[0]
    WORDS: gl.constexpr = _value_layout(WARPS, DIM // 32, KEYS // 2)
    OF_PAIR: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WORDS))))
    eighth = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, WORDS))))
    word = gl.arange(0, DIM // 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WORDS))))
    first = warp[:, None, None, None] * KEYS
    key = first + gl.arange(0, KEYS // 2, layout=OF_PAIR)[None, None, None, :] * 2
    word = eighth[None, :, None, None] * (DIM // 32) + word[None, None, :, None]
    inside = key % BLOCK_SIZE * (DIM // 4) + word
    words = cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    return words, table, inside, key, first if BLOCK_SIZE >= KEYS else key


@gluon.jit
def _load_blocks(source, first_key, end, BLOCK_SIZE: gl.constexpr):
    """Load the blocks of the tile at ``first_key``, of which there are none from ``end`` on."""
    key = first_key + source[4]
    return gl.load(source[1] + key // BLOCK_SIZE, mask=key < end, other=0)


@gluon.jit
def _place(
    source, blocks, first_key, BLOCK_SIZE: gl.constexpr, BLOCK_STRIDE: gl.constexpr, DIM: gl.constexpr,
    STEP: gl.constexpr,
):  # fmt: skip
    """Return pointers to the words of the tile at ``first_key``, in ``blocks``."""
    place = source[0] + (blocks.to(gl.int64) * (BLOCK_STRIDE // 4) + source[2])
    if BLOCK_SIZE > STEP:
        place += first_key % BLOCK_SIZE * (DIM // 4)
    return place


@gluon.jit
def _dimension(row, WORDS: gl.constexpr, number: gl.constexpr):
    """Return the dimension of a value that a row of the product of all words' ``number`` of four is."""
    return (row % 8 * WORDS + row // 8) * 4 + number


@gluon.jit
def _load_heads(
    row_ptr, norm_ptr, column, rotation, mask, eps, offset,
    DIM: gl.constexpr, NORM: gl.constexpr, OFFSET: gl.constexpr, LAST: gl.constexpr, ROTATED: gl.constexpr,
):  # fmt: skip
    """Load heads, norm and rotate them: the dimensions ``column``, and those two further on. LAST: norms come behind the
    rotation."""
    x0 = gl.load(row_ptr + column, mask=mask, other=0.0)
    x1 = gl.load(row_ptr + column + 2, mask=mask, other=0.0)
    if ROTATED:
        cos0, sin0, partner0 = rotation[0]
        cos1, sin1, partner1 = rotation[1]
        other0 = gl.load(row_ptr + partner0, mask=mask, other=0.0)
        other1 = gl.load(row_ptr + partner1, mask=mask, other=0.0)
    if NORM:
        norm0, norm1 = gl.load(norm_ptr + column), gl.load(norm_ptr + column + 2)
    if NORM and not LAST:
        inverse = _inverse_rms(x0, x1, eps, DIM)
        x0 = _scaled_by_norm(x0, inverse, norm0, offset, OFFSET)
        x1 = _scaled_by_norm(x1, inverse, norm1, offset, OFFSET)
        if ROTATED:
            other0 = _scaled_by_norm(other0, inverse, gl.load(norm_ptr + partner0), offset, OFFSET)
            other1 = _scaled_by_norm(other1, inverse, gl.load(norm_ptr + partner1), offset, OFFSET)
    if ROTATED:
        x0, x1 = _rotated(x0, other0, cos0, sin0), _rotated(x1, other1, cos1, sin1)
    if NORM and LAST:
        inverse = _inverse_rms(x0, x1, eps, DIM)
        x0 = _scaled_by_norm(x0, inverse, norm0, offset, OFFSET)
        x1 = _scaled_by_norm(x1, inverse, norm1, offset, OFFSET)
    return x0, x1


@gluon.jit
def _inverse_rms(x0, x1, eps, DIM: gl.constexpr):
    """:func:`engine.kernels.rms_norm.inverse_rms` of heads in two halves."""
    squares = x0.to(gl.float32) * x0.to(gl.float32) + x1.to(gl.float32) * x1.to(gl.float32)
    return 1.0 / gl.sqrt(gl.sum(squares, axis=0)[None, :] / DIM + eps)


@gluon.jit
def _attend(
    state, queries, tile, keys, values, blocks, first_key, following, last, visible, scale,
    BLOCK_SIZE: gl.constexpr, BLOCK_STRIDE: gl.constexpr, DIM: gl.constexpr, SUMS: gl.constexpr,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """Add the tile at ``first_key`` to the softmax, and load the one at ``following`` if it lies before ``last``.

    Registers are filled again as soon as they have been used: while other warps compute, all of a warp's are on their
    way. Each number is read once, so L1 has nothing to keep.

    Args:
        tile: the words of keys, of the values of even keys and of those of odd ones.
        blocks: of the following tile; those of the next one are returned with the state and the tile.
    """
    STEP: gl.constexpr = tile[0].shape[0] * tile[0].shape[1]
    k_place = _place(keys, blocks[0], following, BLOCK_SIZE, BLOCK_STRIDE, DIM, STEP)
    v_place = _place(values, blocks[1], following, BLOCK_SIZE, BLOCK_STRIDE, DIM, STEP)
    known = following < last
    k, even, odd = tile
    scores = _scores(queries, k, SUMS)
    k = gl.load(k_place, mask=known, cache_modifier=".cg")
    state, probs = _softmax(state, scores, first_key, visible, scale, MASKED, WINDOW, CAP, SUMS)
    state = _add_values(state, probs, even, odd, SUMS)
    even = gl.load(v_place, mask=known, cache_modifier=".cg")
    odd = gl.load(v_place + DIM // 4, mask=known, cache_modifier=".cg")
    after = following + STEP
    blocks = (_load_blocks(keys, after, last, BLOCK_SIZE), _load_blocks(values, after, last, BLOCK_SIZE))
    return state, (k, even, odd), blocks


@gluon.jit
def _scores(queries, k, SUMS: gl.constexpr):
    """Multiply a tile of keys by queries, both in two halves: ``(W, KEYS, ROWS)``."""
    first, second = halves_of_words(k, gl.DotOperandLayout(0, SUMS, k.type.layout.k_width * 2), 2)
    scores = gl.zeros([k.shape[0], k.shape[1], queries[0].shape[2]], gl.float32, SUMS)
    return mma_v2(second, queries[1], mma_v2(first, queries[0], scores))


@gluon.jit
def _softmax(
    state, scores, first_key, visible, scale,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Add a tile's scores to the online softmax; see :func:`engine.kernels.paged.accumulate`.

    Args:
        state: a quarter of the dimensions of values each ``(W, D / 4, ROWS)``, the largest score ``(W, ROWS)``, and
            the sum of the probabilities of each key of a tile ``(W, KEYS, ROWS)``.
        visible: where keys end, the position of the query, and its window.

    Returns:
        The new state, which lacks this tile's values, and the probabilities, float16, as a right operand.
    """
    acc, row_max, sums = state
    if CAP > 0:
        scores = _capped(scores, scale, CAP)
        scale = 1.0
    if MASKED:
        key = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))[None, :, None]
        warp = gl.arange(0, scores.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None]
        key += warp * scores.shape[1] + first_key
        end, newest, window = visible
        seen = key < end
        if WINDOW:
            seen = seen & (key > newest - window)
        scores = gl.where(seen, scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale)
    base = new_max
    if MASKED:
        # For a row that has seen no key yet, -inf - -inf would be NaN.
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    probs = gl.exp2(scores * scale - base[:, None, :])
    decay = gl.exp2(row_max - base)[:, None, :]
    sums = sums * decay + probs
    acc = (acc[0] * decay, acc[1] * decay, acc[2] * decay, acc[3] * decay)
    return (acc, new_max, sums), _right_operand(probs.to(gl.float16), SUMS)


@gluon.jit
def _right_operand(probs, SUMS: gl.constexpr):
    """Turn a result ``(W, KEYS, ROWS)`` of the tensor cores, float16, into a right operand: each 8 by 8 are transposed."""
    W: gl.constexpr = probs.shape[0]
    KEYS: gl.constexpr = probs.shape[1]
    ROWS: gl.constexpr = probs.shape[2]
    transposed = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r", [probs], dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip
    transposed = gl.reshape(transposed, [W, KEYS // 8, 8, ROWS // 8, 8])
    transposed = gl.reshape(gl.permute(transposed, (0, 1, 4, 3, 2)), [W, KEYS, ROWS])
    return gl.convert_layout(transposed, gl.DotOperandLayout(1, SUMS, 2), assert_trivial=True)


@gluon.jit
def _add_values(state, probs, even, odd, SUMS: gl.constexpr):
    """Add a tile's values, weighted by ``probs``."""
    acc, row_max, sums = state
    WORDS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 1)
    rows: gl.constexpr = [even.shape[0], even.shape[1] * even.shape[2], even.shape[3]]
    even = gl.convert_layout(gl.reshape(gl.permute(even, (0, 2, 1, 3)), rows), WORDS, assert_trivial=True)
    odd = gl.convert_layout(gl.reshape(gl.permute(odd, (0, 2, 1, 3)), rows), WORDS, assert_trivial=True)
    a, b, c, d = _paired(even, odd, gl.DotOperandLayout(0, SUMS, 2))
    acc = (
        mma_v2(a, probs, acc[0]),
        mma_v2(b, probs, acc[1]),
        mma_v2(c, probs, acc[2]),
        mma_v2(d, probs, acc[3]),
    )
    return acc, row_max, sums


@gluon.jit
def _paired(even, odd, LAYOUT: gl.constexpr):
    """Convert words of four fp8 numbers of even and of odd keys to fp16: the first of each word, by turns of keys, in
    LAYOUT; then the second, the third and the fourth."""
    a0, a1, b0, b1, c0, c1, d0, d1 = gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 ab, cd, pair;
        prmt.b32 ab, $8, $9, 0x5140;
        prmt.b32 cd, $8, $9, 0x7362;
        mov.b32 {low, high}, ab;
        cvt.rn.f16x2.e4m3x2 pair, low;
        mov.b32 {$0, $1}, pair;
        cvt.rn.f16x2.e4m3x2 pair, high;
        mov.b32 {$2, $3}, pair;
        mov.b32 {low, high}, cd;
        cvt.rn.f16x2.e4m3x2 pair, low;
        mov.b32 {$4, $5}, pair;
        cvt.rn.f16x2.e4m3x2 pair, high;
        mov.b32 {$6, $7}, pair;
        }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [even, odd],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True, pack=1,
    )  # fmt: skip
    return (
        interleaved(a0, a1, LAYOUT, 2), interleaved(b0, b1, LAYOUT, 2),
        interleaved(c0, c1, LAYOUT, 2), interleaved(d0, d1, LAYOUT, 2),
    )  # fmt: skip


@gluon.jit
def _merge(
    partial_ptr, stats_ptr, out_ptr, splits, used, value_scale,
    GROUP: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Merge the ``used`` splits of a group of heads by their maxima and sums."""
    PARTS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    STATS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, PARTS)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, STATS))[:, None]
    each = gl.arange(0, 32, layout=gl.SliceLayout(0, STATS))[None, :]
    stat = stats_ptr + (row * splits + each) * 2
    known = (row < GROUP) & (each < used)
    maxima = gl.load(stat, mask=known, other=float("-inf"))
    row_sums = gl.load(stat + 1, mask=known, other=0.0)
    top = gl.max(maxima, axis=1)
    top = gl.where(top == float("-inf"), 0.0, top)
    total = gl.sum(row_sums * gl.exp2(maxima - top[:, None]), axis=1)
    top = gl.convert_layout(top, ROW)
    total = gl.convert_layout(total, ROW)[:, None]
    row = gl.arange(0, ROWS, layout=ROW)
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, PARTS))[None, :]
    in_group = (row < GROUP)[:, None] & (column >= 0)
    acc = gl.zeros([ROWS, DIM], gl.float32, PARTS)
    for first in range(0, used, 4):
        for i in gl.static_range(4):
            part = row * splits + first + i
            there = (row < GROUP) & (first + i < used)
            weight = gl.exp2(gl.load(stats_ptr + part * 2, mask=there, other=float("-inf")) - top)
            values = gl.load(
                partial_ptr + part[:, None] * DIM + column, mask=there[:, None] & in_group, other=0.0
            )
            acc += values * weight[:, None]
    result = acc / gl.where(in_group, total, 1.0) * value_scale
    target = out_ptr + row[:, None] * DIM + column
    gl.store(target, result.to(out_ptr.dtype.element_ty), mask=in_group)
