"""What tiles of consecutive tokens leave to the scan of the gated delta rule.

Tiles are condensed as in :mod:`engine.kernels.delta_rule`: with ``R = (I + A)^-1`` a tile writes
``u = R b v - W S`` with ``W = R b exp(G) k``, and the state after it is
``exp(G_last) S + (exp(G_last - G) k)' u``. What does not depend on ``S`` is computed of all tiles at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.delta_rule import CHUNK, NORM_EPS, DeltaGates, log_decay
from engine.kernels.launch import launch
from engine.kernels.paged import AttentionMetadata, find_tile, query_tiles
from engine.kernels.recurrent_state import StateCache

#: Sequences of so few new tokens are taken token by token: there may be many beside a prompt.
SHORT = 32
#: Keys and values of a head are padded to this many at least. With Triton 3.6.0 on an H200, a GEMM with its
#: left operand in registers and fewer columns ended in illegal memory accesses.
LEAST_DIM = 64
#: Heads of a program that computes gates.
_GATE_HEADS = 16


@dataclass(frozen=True, slots=True)
class DeltaTiles:
    """What tiles of ``C`` tokens of a batch leave to the scan, for each value head; zeros at padding.

    Tiles stand where :func:`tile_place` says; not all places are taken. All but ``gates`` have the model's
    dtype.

    Attributes:
        taken: ``(tiles, heads, C, K)``, ``-W``: what a token's writing loses to the state before the tile.
        keys: ``(tiles, heads, C, K)``, of length 1, decayed up to the tile's end.
        queries: ``(tiles, heads, C, K)``, scaled, with the decay since the tile's begin.
        written: ``(tiles, heads, V, C)``, what tokens write if the state before the tile is zero.
        scores: ``(tiles, heads, C, C)``, queries times keys before them, with the decay between.
        gates: ``(tiles, heads, 2, C)`` float32: sums of ``g`` up to each token, and strengths.
    """

    taken: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    written: torch.Tensor
    scores: torch.Tensor
    gates: torch.Tensor


def condense(qkv: torch.Tensor, gates: DeltaGates, cache: StateCache, meta: AttentionMetadata) -> DeltaTiles:
    """Condense the sequences of more than ``SHORT`` new tokens; see :func:`engine.kernels.dispatch.delta_rule`."""
    sequences, (_, heads, key_dim, value_dim) = meta.seq_lens.shape[0], cache.recurrent.shape
    keys, values = (max(LEAST_DIM, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    grid = query_tiles(len(qkv), sequences, CHUNK)
    # The scan reads one tile ahead.
    places = 3 * (len(qkv) // CHUNK + 2)
    shapes = [(CHUNK, keys), (CHUNK, keys), (CHUNK, keys), (values, CHUNK), (CHUNK, CHUNK)]
    parts = [qkv.new_empty((places, heads, *shape)) for shape in shapes]
    tiles = DeltaTiles(*parts, qkv.new_empty((places, heads, 2, CHUNK), dtype=torch.float32))
    batch = {"query_start_ptr": meta.query_start, "seq_lens_ptr": meta.seq_lens, "sequences": sequences}
    launch(
        _delta_gates_kernel, (grid, triton.cdiv(heads, _GATE_HEADS)),
        strength_ptr=gates.strength, decay_ptr=gates.decay, log_rate_ptr=gates.log_rate, shift_ptr=gates.shift,
        gates_ptr=tiles.gates, **batch,
        strength_stride=gates.strength.stride(0), decay_stride=gates.decay.stride(0),
        HEADS=heads, BLOCK=_GATE_HEADS, CHUNK=CHUNK, SHORT=SHORT, num_warps=4,
    )  # fmt: skip
    launch(
        _delta_tiles_kernel, (grid, heads),
        qkv_ptr=qkv, gates_ptr=tiles.gates, taken_ptr=tiles.taken, keys_ptr=tiles.keys,
        queries_ptr=tiles.queries, written_ptr=tiles.written, scores_ptr=tiles.scores, **batch,
        qkv_stride=qkv.stride(0), HEADS=heads, KEY_HEADS=(qkv.shape[1] - heads * value_dim) // (2 * key_dim),
        KEY_DIM=key_dim, VALUE_DIM=value_dim, KEYS=keys, VALUES=values, CHUNK=CHUNK, SHORT=SHORT,
        EPS=NORM_EPS, num_warps=4,
    )  # fmt: skip
    return tiles


@triton.jit
def tile_place(begin, number, CHUNK: tl.constexpr, SHORT: tl.constexpr):
    """Return where tile ``number`` of a sequence stands that begins with token ``begin`` of the batch.

    Within 64 tokens of a batch at most two sequences of more than 32 begin, and at most one tile of a
    sequence that has begun before.
    """
    tl.static_assert(2 * (SHORT + 1) > CHUNK)
    first = tl.where(number == 0, 1 + begin % CHUNK // (SHORT + 1), 0)
    return (3 * (begin // CHUNK + number) + first).to(tl.int64)


@triton.jit
def segment_place(begin, number, SEGMENT: tl.constexpr):
    """Return where the states of a sequence's segment stand, if the sequence has several.

    Within ``SEGMENT`` tokens of a batch at most one such sequence begins, and at most one segment of one that
    has begun before.
    """
    return (2 * (begin // SEGMENT + number) + tl.where(number == 0, 1, 0)).to(tl.int64)


@triton.jit(do_not_specialize=["sequences"])
def _delta_gates_kernel(
    strength_ptr, decay_ptr, log_rate_ptr, shift_ptr, gates_ptr, query_start_ptr, seq_lens_ptr,
    sequences, strength_stride, decay_stride,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """One program per tile and block of heads. Padding has strength 0 and no decay of its own."""
    _sequence, begin, first_token, count, _length = find_tile(
        query_start_ptr, seq_lens_ptr, tl.program_id(0), sequences, CHUNK
    )
    if (first_token >= count) | (count <= SHORT):
        return
    line = tl.arange(0, CHUNK)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = (begin + first_token + line).to(tl.int64)[:, None]
    mask = (first_token + line < count)[:, None] & (head < HEADS)[None, :]
    raw = tl.load(strength_ptr + row * strength_stride + head[None, :], mask=mask, other=0.0)
    strength = tl.where(mask, (1.0 / (1.0 + tl.exp(-raw.to(tl.float32)))).to(raw.dtype).to(tl.float32), 0.0)
    raw = tl.load(decay_ptr + row * decay_stride + head[None, :], mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(log_rate_ptr + head, mask=head < HEADS, other=0.0)[None, :]
    shift = tl.load(shift_ptr + head, mask=head < HEADS, other=0.0)[None, :]
    total = tl.cumsum(tl.where(mask, log_decay(raw, rate, shift), 0.0), axis=0)
    place = tile_place(begin, first_token // CHUNK, CHUNK, SHORT)
    gates = gates_ptr + (place * HEADS + head)[None, :] * 2 * CHUNK + line[:, None]
    inside = (head < HEADS)[None, :] & (line >= 0)[:, None]
    tl.store(gates, total, mask=inside)
    tl.store(gates + CHUNK, strength, mask=inside)


@triton.jit
def _invert(a, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """Invert ``I + a`` for ``a (CHUNK, CHUNK)`` float32, which is zero on and above its diagonal.

    Blocks on the diagonal are inverted from those of half their size: with ``D`` these inverses and ``N``
    what lies between the halves, the inverse is ``D - D N D``. Neither ``a`` nor the inverse has elements
    above 1, so float16 holds the factors as well as tf32 would.
    """
    tl.static_assert(CHUNK == 64)
    index = tl.arange(0, CHUNK)
    row, column = index[:, None], index[None, :]
    inverse = tl.where(row == column, 1.0, tl.where(row // 2 == column // 2, -a, 0.0))
    for level in tl.static_range(1, 6):
        apart = (row >> level) != (column >> level)
        between = tl.where(apart & ((row >> (level + 1)) == (column >> (level + 1))), a, 0.0)
        low = inverse.to(DTYPE)
        product = tl.dot(low, between.to(DTYPE), input_precision="ieee")
        inverse -= tl.dot(product.to(DTYPE), low, input_precision="ieee")
    return inverse


@triton.jit(do_not_specialize=["sequences"])
def _delta_tiles_kernel(
    qkv_ptr, gates_ptr, taken_ptr, keys_ptr, queries_ptr, written_ptr, scores_ptr,
    query_start_ptr, seq_lens_ptr, sequences, qkv_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """One program per tile and value head computes :class:`DeltaTiles` from its gates."""
    head = tl.program_id(1)
    _sequence, begin, first_token, count, _length = find_tile(
        query_start_ptr, seq_lens_ptr, tl.program_id(0), sequences, CHUNK
    )
    if (first_token >= count) | (count <= SHORT):
        return
    line = tl.arange(0, CHUNK)
    valid = first_token + line < count
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    k_mask = valid[:, None] & (key < KEY_DIM)[None, :]
    v_mask = valid[:, None] & (value < VALUE_DIM)[None, :]
    source = qkv_ptr + (begin + first_token).to(tl.int64) * qkv_stride
    of_head = line[:, None] * qkv_stride + (head // (HEADS // KEY_HEADS) * KEY_DIM + key)[None, :]
    k = tl.load(source + KEY_HEADS * KEY_DIM + of_head, mask=k_mask, other=0.0)
    q = tl.load(source + of_head, mask=k_mask, other=0.0)
    dtype = k.dtype
    block = tile_place(begin, first_token // CHUNK, CHUNK, SHORT) * HEADS + head
    gates = gates_ptr + block * 2 * CHUNK
    total, last = tl.load(gates + line), tl.load(gates + CHUNK - 1)
    strength = tl.load(gates + CHUNK + line)

    wide = k.to(tl.float32)
    k_scale = tl.rsqrt(tl.sum(wide * wide, axis=1) + EPS)
    place = line[:, None] * KEYS + key[None, :]
    decayed = wide * (k_scale * tl.exp(last - total))[:, None]
    tl.store(keys_ptr + block * CHUNK * KEYS + place, decayed.to(dtype))
    wide = q.to(tl.float32)
    q_scale = tl.rsqrt(tl.sum(wide * wide, axis=1) + EPS) * KEY_DIM**-0.5
    decayed = wide * (q_scale * tl.exp(total))[:, None]
    tl.store(queries_ptr + block * CHUNK * KEYS + place, decayed.to(dtype))
    v_place = line[:, None] * qkv_stride + value[None, :]
    v = tl.load(source + 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + v_place, mask=v_mask, other=0.0)

    seen = line[:, None] >= line[None, :]
    between = tl.exp(tl.where(seen, total[:, None] - total[None, :], 0.0)) * k_scale[None, :]
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(seen, scores * between * q_scale[:, None], 0.0)
    square = line[:, None] * CHUNK + line[None, :]
    tl.store(scores_ptr + block * CHUNK * CHUNK + square, scores.to(dtype))
    gram = tl.dot(k, tl.trans(k), input_precision="ieee")
    gram = gram * between * (k_scale * strength)[:, None]
    below = line[:, None] > line[None, :]
    inverse = _invert(tl.where(below, gram, 0.0), CHUNK, tl.float32 if dtype == tl.float32 else tl.float16)
    inverse = inverse * strength[None, :]
    written = tl.dot(tl.trans(v), tl.trans(inverse.to(dtype)), input_precision="ieee")
    columns = value[:, None] * CHUNK + line[None, :]
    tl.store(written_ptr + block * VALUES * CHUNK + columns, written.to(dtype))
    inverse = inverse * (k_scale * -tl.exp(total))[None, :]
    taken = tl.dot(inverse.to(dtype), k, input_precision="ieee")
    tl.store(taken_ptr + block * CHUNK * KEYS + place, taken.to(dtype))
