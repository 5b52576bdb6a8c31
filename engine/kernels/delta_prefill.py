"""The gated delta rule for prompt chunks in Triton, in three kernels.

Tiles of consecutive tokens are condensed as in :mod:`engine.kernels.delta_rule`: with ``R = (I + A)^-1`` a
tile writes ``u = R b v - (R b exp(G) k) S``, and the state after it is ``exp(G_last) S + k' u`` with
``k' = exp(G_last - G) k``. The first kernel computes ``R b v``, ``R b exp(G) k`` and ``k'`` of all tiles at
once. The second one goes through the tiles of a sequence in order, carries the state and keeps it before
each tile: two GEMMs a tile are all that waits for the tile before. The third one computes the outputs of all
tiles at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.delta_rule import CHUNK, NORM_EPS, DeltaGates, log_decay, unit_vectors
from engine.kernels.launch import launch
from engine.kernels.paged import AttentionMetadata, find_tile, query_tiles
from engine.kernels.recurrent_state import StateCache

#: Values of a head whose state one program of the second kernel carries.
_SCAN_VALUES = 32
#: Keys and values of a head that the first and the third kernel take at least. With Triton 3.6.0 on an H200,
#: a GEMM with its left operand in registers and fewer columns than these ended in illegal memory accesses.
_LEAST = 64


def delta_prefill_triton(
    qkv: torch.Tensor, gates: DeltaGates, cache: StateCache, meta: AttentionMetadata
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.delta_rule`."""
    tokens, (_, heads, key_dim, value_dim) = len(qkv), cache.recurrent.shape
    sequences, device = meta.seq_lens.shape[0], qkv.device
    assert meta.state_rows is not None and qkv.stride(-1) == 1
    tiles = query_tiles(tokens, sequences, CHUNK)
    out = torch.empty((tokens, heads, value_dim), dtype=qkv.dtype, device=device)
    # The outputs take the place of what the tokens write.
    taken, decayed = torch.empty((2, tokens, heads, key_dim), dtype=qkv.dtype, device=device)
    total = torch.empty((tokens, heads), dtype=torch.float32, device=device)
    states = torch.empty((tiles, heads, key_dim, value_dim), dtype=qkv.dtype, device=device)
    key_heads = (qkv.shape[1] - heads * value_dim) // (2 * key_dim)
    keys, values = (max(_LEAST, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    batch = {"query_start_ptr": meta.query_start, "seq_lens_ptr": meta.seq_lens}
    sizes = {"HEADS": heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "KEYS": keys, "CHUNK": CHUNK}
    of_qkv = {"qkv_ptr": qkv, "qkv_stride": qkv.stride(0), "KEY_HEADS": key_heads, "EPS": NORM_EPS}
    launch(
        _delta_tiles_kernel, (tiles, heads),
        taken_ptr=taken, decayed_ptr=decayed, written_ptr=out, total_ptr=total,
        strength_ptr=gates.strength, decay_ptr=gates.decay,
        log_rate_ptr=gates.log_rate, shift_ptr=gates.shift, sequences=sequences,
        strength_stride=gates.strength.stride(0), decay_stride=gates.decay.stride(0),
        **batch, **of_qkv, **sizes, VALUES=values,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    block = min(_SCAN_VALUES, values)
    launch(
        _delta_scan_kernel, (triton.cdiv(value_dim, block), heads, sequences),
        taken_ptr=taken, decayed_ptr=decayed, written_ptr=out, total_ptr=total,
        states_ptr=states, state_ptr=cache.recurrent, rows_ptr=meta.state_rows,
        **batch, **sizes, VALUES=block, num_warps=4, num_stages=3,
    )  # fmt: skip
    launch(
        _delta_outputs_kernel, (tiles, heads),
        out_ptr=out, total_ptr=total, states_ptr=states, sequences=sequences,
        **batch, **of_qkv, **sizes, VALUES=values, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _invert(a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Invert ``I + a`` for ``a (CHUNK, CHUNK)`` float32, which is zero on and above its diagonal.

    Diagonal blocks ``D`` of 16 by 16 are inverted row by row. With the rest ``N`` and ``M = D^-1 N`` the
    inverse is ``(I - M)(I + M²) D^-1``: ``M`` is block-triangular, and ``M^4`` is zero for up to 4 blocks.
    """
    BLOCKS: tl.constexpr = CHUNK // 16
    tl.static_assert(BLOCKS <= 4)
    index = tl.arange(0, CHUNK)
    same = (index[:, None] // 16) == (index[None, :] // 16)
    number = tl.arange(0, BLOCKS)
    on_diagonal = number[:, None, None, None] == number[None, None, :, None]
    blocks = tl.reshape(-tl.where(same, a, 0.0), (BLOCKS, 16, BLOCKS, 16))
    inverse = tl.sum(tl.where(on_diagonal, blocks, 0.0), axis=2)
    line = tl.arange(0, 16)
    for i in range(1, 16):
        here = line[None, :, None] == i
        row = tl.sum(tl.where(here, inverse, 0.0), axis=1)
        row += tl.sum(row[:, :, None] * inverse, axis=1)
        inverse = tl.where(here, row[:, None, :], inverse)
    spread = tl.where(on_diagonal, inverse[:, :, None, :], 0.0)
    unit = tl.where(index[:, None] == index[None, :], 1.0, 0.0)
    inverse = tl.reshape(spread, (CHUNK, CHUNK)) + unit
    rest = tl.dot(inverse, tl.where(same, 0.0, a), input_precision=PRECISION)
    square = tl.dot(rest, rest, input_precision=PRECISION)
    product = tl.dot(unit - rest, unit + square, input_precision=PRECISION)
    return tl.dot(product, inverse, input_precision=PRECISION)


@triton.jit(do_not_specialize=["sequences"])
def _delta_tiles_kernel(
    qkv_ptr, strength_ptr, decay_ptr, log_rate_ptr, shift_ptr, query_start_ptr, seq_lens_ptr,
    taken_ptr, decayed_ptr, written_ptr, total_ptr, sequences, qkv_stride, strength_stride, decay_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile and value head: what the tile's tokens write if the state before it is zero, what
    of that state they take away, their keys with the decay up to the tile's end, and the sum of ``g`` up to
    each of them."""
    _sequence, begin, first_token, count, _length = find_tile(
        query_start_ptr, seq_lens_ptr, tl.program_id(0), sequences, CHUNK
    )
    if first_token >= count:
        return
    head = tl.program_id(1)
    token = first_token + tl.arange(0, CHUNK)
    valid = token < count
    row = (begin + token).to(tl.int64)
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    k_mask = valid[:, None] & (key < KEY_DIM)[None, :]
    v_mask = valid[:, None] & (value < VALUE_DIM)[None, :]
    k_place = (KEY_HEADS + head // (HEADS // KEY_HEADS)) * KEY_DIM + key
    v_place = 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + value
    k = tl.load(qkv_ptr + row[:, None] * qkv_stride + k_place[None, :], mask=k_mask, other=0.0)
    dtype = k.dtype
    k = unit_vectors(k.to(tl.float32), EPS)
    raw = tl.load(strength_ptr + row * strength_stride + head, mask=valid, other=0.0)
    strength = tl.where(valid, (1.0 / (1.0 + tl.exp(-raw.to(tl.float32)))).to(raw.dtype).to(tl.float32), 0.0)
    raw = tl.load(decay_ptr + row * decay_stride + head, mask=valid, other=0.0).to(tl.float32)
    decay = log_decay(raw, tl.load(log_rate_ptr + head), tl.load(shift_ptr + head))
    total = tl.cumsum(tl.where(valid, decay, 0.0), axis=0)
    tl.store(total_ptr + row * HEADS + head, total, mask=valid)

    place = (row * HEADS + head)[:, None]
    # Padding has no decay of its own: the last token's sum is the least.
    decayed = k * tl.exp(tl.min(total, axis=0) - total)[:, None]
    tl.store(decayed_ptr + place * KEY_DIM + key[None, :], decayed.to(dtype), mask=k_mask)
    below = token[:, None] > token[None, :]
    between = tl.exp(tl.where(below, total[:, None] - total[None, :], 0.0))
    low = k.to(dtype)
    gram = tl.dot(low, tl.trans(low), input_precision="ieee")
    inverse = _invert(tl.where(below, gram * between * strength[:, None], 0.0), CHUNK, PRECISION).to(dtype)
    taken = (k * (strength * tl.exp(total))[:, None]).to(dtype)
    taken = tl.dot(inverse, taken, input_precision="ieee")
    tl.store(taken_ptr + place * KEY_DIM + key[None, :], taken.to(dtype), mask=k_mask)
    v = tl.load(qkv_ptr + row[:, None] * qkv_stride + v_place[None, :], mask=v_mask, other=0.0)
    written = (v.to(tl.float32) * strength[:, None]).to(dtype)
    written = tl.dot(inverse, written, input_precision="ieee")
    tl.store(written_ptr + place * VALUE_DIM + value[None, :], written.to(dtype), mask=v_mask)


@triton.jit
def _delta_scan_kernel(
    taken_ptr, decayed_ptr, written_ptr, total_ptr, states_ptr, state_ptr, rows_ptr,
    query_start_ptr, seq_lens_ptr,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per sequence, value head and block of its values: what the tokens of each tile write, in
    the place of what they would write without a state, and the state before each tile."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    begin = tl.load(query_start_ptr + sequence)
    count = tl.load(query_start_ptr + sequence + 1) - begin
    if count <= 0:
        return
    key, value = tl.arange(0, KEYS), tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    in_key, in_value = key < KEY_DIM, value < VALUE_DIM
    s_place = key[:, None] * VALUE_DIM + value[None, :]
    s_mask = in_key[:, None] & in_value[None, :]
    state_row = tl.load(rows_ptr + sequence).to(tl.int64)
    state = state_ptr + (state_row * HEADS + head) * KEY_DIM * VALUE_DIM + s_place
    s = tl.load(state, mask=s_mask, other=0.0)
    s = tl.where(tl.load(seq_lens_ptr + sequence) > count, s, 0.0)
    first_tile = (begin // CHUNK + sequence).to(tl.int64)
    before = states_ptr + (first_tile * HEADS + head) * KEY_DIM * VALUE_DIM + s_place
    line = tl.arange(0, CHUNK)
    for first_token in range(0, count, CHUNK):
        valid = first_token + line < count
        row = (begin + first_token + line).to(tl.int64)
        place = (row * HEADS + head)[:, None]
        k_mask = valid[:, None] & in_key[None, :]
        v_mask = valid[:, None] & in_value[None, :]
        taken = tl.load(taken_ptr + place * KEY_DIM + key[None, :], mask=k_mask, other=0.0)
        decayed = tl.load(decayed_ptr + place * KEY_DIM + key[None, :], mask=k_mask, other=0.0)
        written = written_ptr + place * VALUE_DIM + value[None, :]
        v = tl.load(written, mask=v_mask, other=0.0)
        last = tl.minimum(first_token + CHUNK, count) - 1
        kept = tl.exp(tl.load(total_ptr + (begin + last).to(tl.int64) * HEADS + head))
        low = s.to(taken.dtype)
        tl.store(before, low, mask=s_mask)
        before += HEADS * KEY_DIM * VALUE_DIM
        u = (v.to(tl.float32) - tl.dot(taken, low, input_precision="ieee")).to(taken.dtype)
        tl.store(written, u, mask=v_mask)
        s = s * kept + tl.dot(tl.trans(decayed), u, input_precision="ieee")
    tl.store(state, s, mask=s_mask)


@triton.jit(do_not_specialize=["sequences"])
def _delta_outputs_kernel(
    qkv_ptr, out_ptr, total_ptr, states_ptr, query_start_ptr, seq_lens_ptr, sequences, qkv_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One program per tile and value head; the outputs take the place of what the tokens write."""
    _sequence, begin, first_token, count, _length = find_tile(
        query_start_ptr, seq_lens_ptr, tl.program_id(0), sequences, CHUNK
    )
    if first_token >= count:
        return
    head, line = tl.program_id(1), tl.arange(0, CHUNK)
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    in_key, in_value = key < KEY_DIM, value < VALUE_DIM
    valid = first_token + line < count
    row = (begin + first_token + line).to(tl.int64)
    k_mask = valid[:, None] & in_key[None, :]
    v_mask = valid[:, None] & in_value[None, :]
    source = qkv_ptr + row[:, None] * qkv_stride + (head // (HEADS // KEY_HEADS) * KEY_DIM + key)[None, :]
    q = tl.load(source, mask=k_mask, other=0.0)
    dtype = q.dtype
    q = (unit_vectors(q.to(tl.float32), EPS) * KEY_DIM**-0.5).to(dtype)
    k = tl.load(source + KEY_HEADS * KEY_DIM, mask=k_mask, other=0.0)
    k = unit_vectors(k.to(tl.float32), EPS).to(dtype)
    total = tl.load(total_ptr + row * HEADS + head, mask=valid, other=0.0)
    seen = line[:, None] >= line[None, :]
    between = tl.exp(tl.where(seen, total[:, None] - total[None, :], 0.0))
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(seen, scores * between, 0.0).to(dtype)
    state = (tl.program_id(0).to(tl.int64) * HEADS + head) * KEY_DIM * VALUE_DIM
    state += key[:, None] * VALUE_DIM + value[None, :]
    low = tl.load(states_ptr + state, mask=in_key[:, None] & in_value[None, :], other=0.0)
    place = out_ptr + (row * HEADS + head)[:, None] * VALUE_DIM + value[None, :]
    u = tl.load(place, mask=v_mask, other=0.0)
    out = tl.dot(q, low, input_precision="ieee") * tl.exp(total)[:, None]
    out += tl.dot(scores, u, input_precision="ieee")
    tl.store(place, out.to(dtype), mask=v_mask)
