"""The gated delta rule for prompt chunks in Triton.

Tiles of tokens are condensed first, see :mod:`engine.kernels.delta_tiles`. The rest is a chain of two GEMMs a
tile, with the outputs beside it. A long chain would leave most of a GPU idle, so it is cut into segments. The
state after a segment is a linear function of that before it, ``M S + N``. Scans compute ``M`` and ``N`` of
all segments at once: ``N`` is the state that the segment leaves behind a state of zero, and ``M`` that behind
the identity if nothing is written. A short kernel joins them to the states between segments; from these,
scans of all segments at once compute the outputs.

States are kept transposed, as ``(V, K)``: both GEMMs of a tile then find their left operand in the registers
where the GEMM before has left it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels import delta_scan
from engine.kernels.delta_rule import CHUNK, DeltaGates, step_tokens
from engine.kernels.delta_tiles import LEAST_DIM, SHORT, DeltaTiles, condense, segment_place, tile_place
from engine.kernels.launch import launch
from engine.kernels.paged import AttentionMetadata, find_tile, query_tiles
from engine.kernels.recurrent_state import StateCache

#: Tokens of a segment. It doesn't depend on the batch, so that a prompt's result doesn't.
_SEGMENT = 2048


def delta_prefill_triton(
    qkv: torch.Tensor, gates: DeltaGates, cache: StateCache, meta: AttentionMetadata
) -> torch.Tensor:
    """See :func:`engine.kernels.dispatch.delta_rule`."""
    assert meta.state_rows is not None and qkv.stride(-1) == 1
    tokens, (_, heads, _, value_dim) = len(qkv), cache.recurrent.shape
    out = torch.empty((tokens, heads, value_dim), dtype=qkv.dtype, device=qkv.device)
    step_tokens(qkv, gates, cache, meta, out, most=SHORT)
    if meta.max_query_len <= SHORT:
        return out
    tiles, states = condense(qkv, gates, cache, meta), None
    if meta.max_query_len > _SEGMENT:
        states = _segment_states(tiles, cache, meta, tokens, _SEGMENT)
    _scan(tiles, out, states, cache, meta, tokens, _SEGMENT)
    return out


def _segment_states(
    tiles: DeltaTiles, cache: StateCache, meta: AttentionMetadata, tokens: int, segment: int
) -> torch.Tensor:
    """Compute the states before the segments of sequences that have several: ``(segments, heads, V, K)``
    float32, see :func:`segment_place`."""
    (_, heads, values, _), keys = tiles.written.shape, tiles.keys.shape[-1]
    slots = 2 * (tokens // segment + 1)
    states = torch.empty((slots, heads, values, keys), dtype=torch.float32, device=tiles.keys.device)
    kept = tiles.keys.new_empty((slots, heads, keys, keys))
    _scan(tiles, None, states, cache, meta, tokens, segment, kept)
    block = min(LEAST_DIM, values)
    launch(
        _delta_join_kernel, (values // block, heads, meta.seq_lens.shape[0]),
        states_ptr=states, kept_ptr=kept, query_start_ptr=meta.query_start,
        HEADS=heads, KEYS=keys, VALUES=values, BLOCK=block, SEGMENT=segment,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return states


def _scan(
    tiles: DeltaTiles, out: torch.Tensor | None, states: torch.Tensor | None,
    cache: StateCache, meta: AttentionMetadata, tokens: int, segment: int, kept: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Go along the tiles of each segment: from ``states`` to the outputs and the new states, or without
    ``out``, from zero to ``states`` and from the identity to ``kept``."""
    if delta_scan.supports(cache, tiles.keys.dtype):
        delta_scan.scan_gluon(tiles, out, states, cache, meta, tokens, segment, kept)
        return
    (_, heads, values, _), keys = tiles.written.shape, tiles.keys.shape[-1]
    key_dim, value_dim = cache.recurrent.shape[2:]
    wide = tiles.keys.dtype == torch.float32
    block = LEAST_DIM if wide else min(128, values)
    columns = values if kept is None else values + keys
    sequences = meta.seq_lens.shape[0]
    none = cache.recurrent
    launch(
        _delta_scan_kernel, (columns // block, heads, query_tiles(tokens, sequences, segment)),
        taken_ptr=tiles.taken, keys_ptr=tiles.keys, queries_ptr=tiles.queries, written_ptr=tiles.written,
        scores_ptr=tiles.scores, gates_ptr=tiles.gates,
        out_ptr=none if out is None else out, states_ptr=none if states is None else states,
        kept_ptr=none if kept is None else kept, state_ptr=cache.recurrent, rows_ptr=meta.state_rows,
        query_start_ptr=meta.query_start, seq_lens_ptr=meta.seq_lens, sequences=sequences,
        HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, KEYS=keys, VALUES=values, BLOCK=block, CHUNK=CHUNK,
        SHORT=SHORT, SEGMENT=segment, OUTPUTS=out is not None,
        # Tiles in float32 fill shared memory.
        num_warps=block // 16, num_stages=1 if wide else 2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["sequences"])
def _delta_scan_kernel(
    taken_ptr, keys_ptr, queries_ptr, written_ptr, scores_ptr, gates_ptr, out_ptr, states_ptr, kept_ptr,
    state_ptr, rows_ptr, query_start_ptr, seq_lens_ptr, sequences,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SHORT: tl.constexpr, SEGMENT: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """One program per segment, value head and block of its values, for which it carries the state.

    With ``OUTPUTS`` it starts from the state before the segment, computes the outputs, and at a sequence's
    end stores the state. Without, it stores what the segment adds to a state, ``(V, K)``, and in programs
    beyond the values that by which it multiplies a transposed state from the right, ``(K, K)``: both in the
    place of the next segment. Into the place of a sequence's first segment goes the state before it.
    """
    head, index = tl.program_id(1), tl.program_id(2)
    sequence, begin, first_token, count, length = find_tile(
        query_start_ptr, seq_lens_ptr, index, sequences, SEGMENT
    )
    if (first_token >= count) | (count <= SHORT):
        return
    number = first_token // SEGMENT
    end = tl.minimum(first_token + SEGMENT, count)
    column = tl.program_id(0) * BLOCK
    if not OUTPUTS:
        if end == count or (first_token == 0 and column >= VALUES):
            return
    key, line, value = tl.arange(0, KEYS), tl.arange(0, CHUNK), column + tl.arange(0, BLOCK)
    state = state_ptr + (tl.load(rows_ptr + sequence).to(tl.int64) * HEADS + head) * KEY_DIM * VALUE_DIM
    state += key[None, :] * VALUE_DIM + value[:, None]
    s_mask = (key < KEY_DIM)[None, :] & (value < VALUE_DIM)[:, None]
    square = value[:, None] * KEYS + key[None, :]
    before = states_ptr + (segment_place(begin, number, SEGMENT) * HEADS + head) * VALUES * KEYS + square
    if OUTPUTS and count > SEGMENT:
        s = tl.load(before)
    elif first_token == 0:
        s = tl.where(length > count, tl.load(state, mask=s_mask, other=0.0), 0.0)
        if not OUTPUTS:
            tl.store(before, s)
    else:
        s = tl.where((value - VALUES)[:, None] == key[None, :], 1.0, 0.0)

    places = line[:, None] * KEYS + key[None, :]
    last = gates_ptr + head * 2 * CHUNK + CHUNK - 1
    tile = tile_place(begin, first_token // CHUNK, CHUNK, SHORT)
    total = tl.load(last + tile * HEADS * 2 * CHUNK)
    for token in range(first_token, end, CHUNK):
        block = tile * HEADS + head
        taken = tl.load(taken_ptr + block * CHUNK * KEYS + places)
        k = tl.load(keys_ptr + block * CHUNK * KEYS + places)
        written = written_ptr + block * VALUES * CHUNK + value[:, None] * CHUNK + line[None, :]
        u = tl.load(written, mask=(value < VALUES)[:, None], other=0.0)
        # The state would wait for that of this tile. Behind the last tile is a place, too.
        decay = tl.exp(total)
        tile = tile_place(begin, token // CHUNK + 1, CHUNK, SHORT)
        total = tl.load(last + tile * HEADS * 2 * CHUNK)
        low = s.to(taken.dtype)
        u = (tl.dot(low, tl.trans(taken), input_precision="ieee") + u.to(tl.float32)).to(taken.dtype)
        if OUTPUTS:
            q = tl.load(queries_ptr + block * CHUNK * KEYS + places)
            scores = tl.load(scores_ptr + block * CHUNK * CHUNK + line[:, None] * CHUNK + line[None, :])
            out = tl.dot(low, tl.trans(q), input_precision="ieee")
            out += tl.dot(u, tl.trans(scores), input_precision="ieee")
            row = (begin + token + line).to(tl.int64) * HEADS + head
            o_mask = (token + line < count)[None, :] & (value < VALUE_DIM)[:, None]
            tl.store(out_ptr + row[None, :] * VALUE_DIM + value[:, None], out.to(low.dtype), mask=o_mask)
        s = s * decay + tl.dot(u, k, input_precision="ieee")
    if OUTPUTS:
        if end == count:
            tl.store(state, s, mask=s_mask)
    else:
        after = segment_place(begin, number + 1, SEGMENT) * HEADS + head
        if column < VALUES:
            tl.store(states_ptr + after * VALUES * KEYS + square, s)
        else:
            kept = kept_ptr + after * KEYS * KEYS + square - VALUES * KEYS
            tl.store(kept, s.to(kept_ptr.dtype.element_ty))


@triton.jit
def _delta_join_kernel(
    states_ptr, kept_ptr, query_start_ptr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """One program per sequence, value head and block of its values: from what segments add to the states
    before them. Before the second segment they are the same."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    begin = tl.load(query_start_ptr + sequence)
    segments = tl.cdiv(tl.load(query_start_ptr + sequence + 1) - begin, SEGMENT)
    if segments < 3:
        return
    key, old = tl.arange(0, KEYS), tl.arange(0, KEYS)
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    states = states_ptr + value[:, None] * KEYS + key[None, :]
    kept = kept_ptr + old[:, None] * KEYS + key[None, :]
    s = tl.load(states + (segment_place(begin, 1, SEGMENT) * HEADS + head) * VALUES * KEYS)
    for number in range(2, segments):
        place = segment_place(begin, number, SEGMENT) * HEADS + head
        added = tl.load(states + place * VALUES * KEYS)
        factor = tl.load(kept + place * KEYS * KEYS)
        s = tl.dot(s.to(factor.dtype), factor, input_precision="ieee") + added
        tl.store(states + place * VALUES * KEYS, s)
