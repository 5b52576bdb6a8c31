"""The scan over tiles of the gated delta rule, for Hopper GPUs; see :mod:`engine.kernels.delta_prefill`.

The general scan loads a tile and computes its GEMMs one after the other, and each of its threads computes
addresses. This kernel specialises warps: one warp loads tiles through tensor memory descriptors (TMA), two
groups of four warps carry the states of 64 values of a head each and share the loaded tiles. While one group
computes on its registers, the other one has the tensor cores.

As :mod:`engine.kernels.prefill_attention` it is written in Gluon, which has no interpreter: its tests need a
Hopper GPU.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.delta_tiles import SHORT, DeltaTiles, segment_place, tile_place
from engine.kernels.device import is_hopper
from engine.kernels.launch import launch
from engine.kernels.paged import AttentionMetadata, find_tile, query_tiles
from engine.kernels.recurrent_state import StateCache
from engine.kernels.ring import barriers, buffers, tma_load

#: Keys and values of a head.
_DIM = 128
#: Registers per thread: 168 for three groups of four warps use all registers of an SM. The compute groups
#: take what the load warp gives up.
_REGISTERS, _COMPUTE_REGISTERS, _LOAD_REGISTERS = 168, 240, 24
_find_tile, _tile_place, _segment_place = (
    gluon.jit(function.fn) for function in (find_tile, tile_place, segment_place)
)


def supports(cache: StateCache, dtype: torch.dtype) -> bool:
    """Return whether the kernel can scan tiles of ``dtype``."""
    return (
        cache.recurrent.shape[2:] == (_DIM, _DIM)
        and dtype in (torch.bfloat16, torch.float16)
        and is_hopper(cache.recurrent.device)
    )


def scan_gluon(
    tiles: DeltaTiles, out: torch.Tensor | None, states: torch.Tensor | None,
    cache: StateCache, meta: AttentionMetadata, tokens: int, segment: int, kept: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`engine.kernels.delta_prefill._scan`; for what :func:`supports` admits."""
    heads, chunk = tiles.keys.shape[1], tiles.keys.shape[2]
    sequences, none = meta.seq_lens.shape[0], cache.recurrent
    launch(
        _delta_chain_kernel, (1 if kept is None else 2, heads, query_tiles(tokens, sequences, segment)),
        taken_desc=_describe(tiles.taken), keys_desc=_describe(tiles.keys),
        queries_desc=_describe(tiles.queries), written_desc=_describe(tiles.written),
        scores_desc=_describe(tiles.scores), gates_ptr=tiles.gates,
        out_ptr=none if out is None else out, states_ptr=none if states is None else states,
        kept_ptr=none if kept is None else kept, state_ptr=cache.recurrent, rows_ptr=meta.state_rows,
        query_start_ptr=meta.query_start, seq_lens_ptr=meta.seq_lens, sequences=sequences,
        HEADS=heads, DIM=_DIM, CHUNK=chunk, SHORT=SHORT, SEGMENT=segment, OUTPUTS=out is not None,
        # All that fit into shared memory.
        STAGES=4 if out is None else 2,
        COMPUTE_REGISTERS=_COMPUTE_REGISTERS, LOAD_REGISTERS=_LOAD_REGISTERS,
        num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip


def _describe(part: torch.Tensor) -> TensorDescriptor:
    """Describe a part of all tiles; a copy takes that of one tile and head."""
    box = list(part.shape[2:])
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[part.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor.from_tensor(part.view(-1, box[1]), box, layout)


# ``sequences`` differs between batch sizes; specialising on it would compile the kernel again at start-up.
@gluon.jit(do_not_specialize=["sequences"])
def _delta_chain_kernel(
    taken_desc, keys_desc, queries_desc, written_desc, scores_desc, gates_ptr, out_ptr, states_ptr, kept_ptr,
    state_ptr, rows_ptr, query_start_ptr, seq_lens_ptr, sequences,
    HEADS: gl.constexpr, DIM: gl.constexpr, CHUNK: gl.constexpr, SHORT: gl.constexpr,
    SEGMENT: gl.constexpr, OUTPUTS: gl.constexpr, STAGES: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per segment, value head, and kind of state: that behind a state, and without ``OUTPUTS``
    that behind the identity; both as :func:`engine.kernels.delta_prefill._delta_scan_kernel` stores them."""
    kind, head, index = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    sequence, begin, first_token, count, length = _find_tile(
        query_start_ptr, seq_lens_ptr, index, sequences, SEGMENT
    )
    end = gl.minimum(first_token + SEGMENT, count)
    works = (first_token < count) & (count > SHORT)
    if not OUTPUTS:
        works = works & (end < count) & ((first_token > 0) | (kind == 0))
    if works:
        dtype: gl.constexpr = taken_desc.dtype
        taken = buffers(STAGES, CHUNK, DIM, dtype)
        keys = buffers(STAGES, CHUNK, DIM, dtype)
        written = buffers(STAGES, DIM, CHUNK, dtype)
        queries = taken
        scores = written
        if OUTPUTS:
            queries = buffers(STAGES, CHUNK, DIM, dtype)
            scores = buffers(STAGES, CHUNK, CHUNK, dtype)
        # Ready: the tile has been loaded. Free: both compute groups have finished with it.
        ring = (taken, keys, written, queries, scores, barriers(STAGES, 1), barriers(STAGES, 2))
        descriptors = (taken_desc, keys_desc, written_desc, queries_desc, scores_desc)
        steps = gl.cdiv(end - first_token, CHUNK)
        number = first_token // SEGMENT
        place = _segment_place(begin, number, SEGMENT) * HEADS + head
        after = _segment_place(begin, number + 1, SEGMENT) * HEADS + head
        state = state_ptr + (gl.load(rows_ptr + sequence).to(gl.int64) * HEADS + head) * DIM * DIM
        before, after = states_ptr + place * DIM * DIM, after * DIM * DIM
        pointers = (state, before, states_ptr + after, kept_ptr + after, gates_ptr, out_ptr)
        span = (begin, first_token, end, count, length, steps, head, kind)
        first: gl.constexpr = 0
        second: gl.constexpr = 1
        gl.warp_specialize(
            [
                (_carry, (first, ring, span, pointers, HEADS, SHORT, SEGMENT, OUTPUTS, STAGES)),
                (_carry, (second, ring, span, pointers, HEADS, SHORT, SEGMENT, OUTPUTS, STAGES)),
                (_load_tiles, (descriptors, ring, span, HEADS, SHORT, OUTPUTS, STAGES)),
            ],
            [4, 1],
            [COMPUTE_REGISTERS, LOAD_REGISTERS],
        )


@gluon.jit
def _load_tiles(
    descriptors, ring, span,
    HEADS: gl.constexpr, SHORT: gl.constexpr, OUTPUTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the tiles of a segment into the ring of shared memory buffers; run by one warp."""
    taken_desc, keys_desc, written_desc, queries_desc, scores_desc = descriptors
    taken, keys, written, queries, scores, ready, free = ring
    begin, first_token, _end, _count, _length, steps, head, kind = span
    CHUNK: gl.constexpr = taken.shape[1]
    DIM: gl.constexpr = taken.shape[2]
    SIZE: gl.constexpr = 2 * CHUNK * DIM
    OUTPUTS_SIZE: gl.constexpr = 2 * CHUNK * (DIM + CHUNK) if OUTPUTS else 0
    for step in range(steps):
        stage = step % STAGES
        bar = ready.index(stage)
        # Before its first phase a barrier counts as having completed the phase before.
        mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
        # Behind the identity nothing is written.
        mbarrier.expect(bar, 3 * SIZE + OUTPUTS_SIZE, pred=kind == 0)
        mbarrier.expect(bar, 2 * SIZE, pred=kind != 0)
        place = _tile_place(begin, first_token // CHUNK + step, CHUNK, SHORT).to(gl.int32)
        row = (place * HEADS + head) * CHUNK
        tma_load(taken_desc, [row, 0], bar, taken.index(stage))
        tma_load(written_desc, [(place * HEADS + head) * DIM, 0], bar, written.index(stage), pred=kind == 0)
        tma_load(keys_desc, [row, 0], bar, keys.index(stage))
        if OUTPUTS:
            tma_load(queries_desc, [row, 0], bar, queries.index(stage))
            tma_load(scores_desc, [row, 0], bar, scores.index(stage))


@gluon.jit
def _carry(
    half: gl.constexpr, ring, span, pointers,
    HEADS: gl.constexpr, SHORT: gl.constexpr, SEGMENT: gl.constexpr, OUTPUTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Carry the state of 64 values through a segment; run by one compute group (four warps). ``half``: which
    64 of the head."""
    taken, keys, written, queries, scores, ready, free = ring
    begin, first_token, end, count, length, steps, head, kind = span
    state, before, after, kept, gates_ptr, out_ptr = pointers
    CHUNK: gl.constexpr = taken.shape[1]
    DIM: gl.constexpr = taken.shape[2]
    VALUES: gl.constexpr = 64
    dtype: gl.constexpr = taken.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    of_tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    # Eight values of a token in one store.
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    value = half * VALUES + gl.arange(0, VALUES, gl.SliceLayout(1, layout))
    key = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    state = state + key[None, :] * DIM + value[:, None]
    square = value[:, None] * DIM + key[None, :]
    zero = gl.zeros([VALUES, CHUNK], gl.float32, of_tile)
    s = gl.zeros([VALUES, DIM], gl.float32, layout)
    if OUTPUTS:
        if count > SEGMENT:
            s = gl.load(before + square)
        else:
            if length > count:
                s = gl.load(state)
    else:
        if first_token == 0:
            if length > count:
                s = gl.load(state)
            gl.store(before + square, s)
        else:
            if kind == 1:
                s = gl.where(value[:, None] == key[None, :], 1.0, s)

    out_value = half * VALUES + gl.arange(0, VALUES, gl.SliceLayout(1, stored))
    out_line = gl.arange(0, CHUNK, gl.SliceLayout(0, stored))
    last = gates_ptr + head * 2 * CHUNK + CHUNK - 1
    tile = first_token // CHUNK
    total = gl.load(last + _tile_place(begin, tile, CHUNK, SHORT) * HEADS * 2 * CHUNK)
    for step in range(steps):
        stage = step % STAGES
        decay = gl.exp(total)
        # The state would wait for that of this tile. Behind the last tile is a place, too.
        total = gl.load(last + _tile_place(begin, tile + step + 1, CHUNK, SHORT) * HEADS * 2 * CHUNK)
        low = gl.convert_layout(s.to(dtype), gl.DotOperandLayout(0, of_tile, 2))
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        u = written.index(stage).slice(half * VALUES, VALUES, 0).load(of_tile).to(gl.float32)
        if not OUTPUTS:
            u = gl.where(kind == 0, u, zero)
        u = warpgroup_mma(low, taken.index(stage).permute((1, 0)), u, is_async=True)
        if OUTPUTS:
            out = warpgroup_mma(low, queries.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = s * decay
            u = warpgroup_mma_wait(1, deps=[u])
        else:
            s = s * decay
            u = warpgroup_mma_wait(0, deps=[u])
        u = u.to(dtype)
        u_state = gl.convert_layout(u, gl.DotOperandLayout(0, layout, 2))
        s = warpgroup_mma(u_state, keys.index(stage), s, is_async=True)
        if OUTPUTS:
            u_out = gl.convert_layout(u, gl.DotOperandLayout(0, of_tile, 2))
            out = warpgroup_mma(u_out, scores.index(stage).permute((1, 0)), out, is_async=True)
            # Operands in registers have to stay until they have been read.
            s, out, low, u_state, u_out = warpgroup_mma_wait(0, deps=[s, out, low, u_state, u_out])
            mbarrier.arrive(free.index(stage), count=1)
            token = first_token + step * CHUNK + out_line
            row = ((begin + token).to(gl.int64) * HEADS + head) * DIM
            result = gl.convert_layout(out.to(dtype), stored)
            gl.store(out_ptr + row[None, :] + out_value[:, None], result, mask=(token < count)[None, :])
        else:
            s, low, u_state = warpgroup_mma_wait(0, deps=[s, low, u_state])
            mbarrier.arrive(free.index(stage), count=1)
    if OUTPUTS:
        if end == count:
            gl.store(state, s)
    else:
        if kind == 0:
            gl.store(after + square, s)
        else:
            gl.store(kept + square, s.to(dtype))
