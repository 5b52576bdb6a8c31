"""A decode step's attention over a paged KV cache in one launch: rotation, cache write, softmax and merge.

Every sequence has one new token. The query heads that share a KV head are the rows of one tile; keys come in tiles
gathered through the block table, as in :mod:`engine.kernels.paged_attention`. Where the sequences are few, the keys
of each are split over several programs, which work out their shares from the sequence's length on the device; the
program that is through last merges them. The new token's key and value never come out of the cache: the program
that puts them there begins its softmax with them.

The last tile of a program's share is the only one that may have keys beyond it. Where programs are few it is asked
for before the kernel ahead has made the query, and comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton
from engine.kernels.kv_write import rotary_kv_write_reference
from engine.kernels.launch import launch
from engine.kernels.overlap import overlap, wait_for_previous
from engine.kernels.paged_attention import LOG2E, accumulate, attend, load_keys, paged_attention_reference
from engine.kernels.rotary import load_angles
from engine.kernels.tiling import Tiling, num_processors

_MAX_SPLITS = 32
#: Programs for a processor from which on they are many, and keys are not split.
_MANY = 2


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    max_seq_len: int,
    window: int | None = None,
    softcap: float | None = None,
    mrope_section: tuple[int, ...] | None = None,
    mrope_interleaved: bool = False,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate each sequence's one new token, write it to the cache, and attend to all tokens up to it.

    What :func:`~engine.kernels.kv_write.rotary_kv_write` and then
    :func:`~engine.kernels.paged_attention.paged_attention` compute. What ``q`` and ``k`` hold afterwards is not
    defined.

    Args:
        q: ``(S, Hq, D)``, last dimension contiguous, as of ``k`` and ``v``.
        k, v: ``(S, Hkv, D)``; ``Hq`` is a multiple of ``Hkv``.
        positions: ``(S,)``, or ``(3, S)`` for axes t, h, w; int64.
        cos, sin: float32 ``(P, R / 2)`` by position; ``R <= D`` leading dimensions are rotated.
        k_cache, v_cache: ``(N, Hkv, block_size, D)`` contiguous, changed in place.
        slot_mapping: ``(S,)`` int64, ``block * block_size + offset`` of the new tokens; negative entries write
            nothing.
        block_tables: ``(S, max_blocks)`` int32.
        seq_lens: ``(S,)`` int32, at least 1: the new token counts.
        scale: multiplies the scores; positive.
        max_seq_len: upper bound of ``seq_lens``, known to the host.
        window: a query at position p sees keys at positions greater than ``p - window``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        mrope_section, mrope_interleaved: see :func:`~engine.kernels.rotary.rotary`.
        arrivals: int32 ``(S or more, Hkv)`` of zeros, and of zeros again afterwards, to count programs in. Used by
            one launch at a time. None: allocated and cleared in each call.

    Returns:
        ``(S, Hq, D)``.
    """
    assert (positions.dim() == 2) == (mrope_section is not None), "sections and axes come together"
    run = decode_attention_triton if use_triton(q) else decode_attention_reference
    return run(
        q,
        k,
        v,
        positions,
        cos,
        sin,
        k_cache,
        v_cache,
        slot_mapping,
        block_tables,
        seq_lens,
        scale=scale,
        max_seq_len=max_seq_len,
        window=window,
        softcap=softcap,
        mrope_section=mrope_section,
        mrope_interleaved=mrope_interleaved,
        arrivals=arrivals,
    )


def decode_attention_reference(
    q,
    k,
    v,
    positions,
    cos,
    sin,
    k_cache,
    v_cache,
    slot_mapping,
    block_tables,
    seq_lens,
    *,
    scale,
    max_seq_len,
    window=None,
    softcap=None,
    mrope_section=None,
    mrope_interleaved=False,
    arrivals=None,
):
    rotary_kv_write_reference(
        q,
        k,
        v,
        positions,
        cos,
        sin,
        k_cache,
        v_cache,
        slot_mapping,
        mrope_section=mrope_section,
        mrope_interleaved=mrope_interleaved,
    )
    starts = torch.arange(len(q) + 1, dtype=torch.int32)
    return paged_attention_reference(
        q, k_cache, v_cache, block_tables, starts, seq_lens, scale=scale, window=window, softcap=softcap
    )


def tiling(
    head_dim: int, group: int, itemsize: int, programs: int, processors: int, max_seq_len: int
) -> tuple[Tiling, int]:
    """The tile for a problem, and how many programs share the keys of a sequence and KV head; the one place where
    this is decided.

    Among the best of a dozen on an H100, by the time of whole decode steps of models of 2 and 7 billion parameters.

    Args:
        group: query heads of a KV head.
        programs: KV heads of all sequences.
        processors: that there are to be filled.
    """
    rows = max(16, triton.next_power_of_2(group))
    many = programs >= _MANY * processors
    large = head_dim > 128 or itemsize > 2
    keys = 32 if many or large else 64
    splits = num_splits(programs, processors, max_seq_len, keys)
    if large:
        return Tiling(rows, keys, 4, 2), splits
    if many:
        # Small ones keep a processor busier than large ones.
        return Tiling(rows, keys, 1, 3), splits
    # With a processor for each program, the sooner one is through, the better. With fewer, what is free is where
    # the next kernel's programs can wait with their weights.
    return Tiling(rows, keys, 8 if programs * splits <= processors else 2, 2), splits


def num_splits(programs: int, processors: int, max_seq_len: int, keys: int) -> int:
    """Programs per sequence and KV head: enough for two on every processor."""
    wanted = -(-_MANY * processors // max(programs, 1))
    return max(1, min(wanted, _MAX_SPLITS, -(-max_seq_len // keys)))


def decode_attention_triton(
    q,
    k,
    v,
    positions,
    cos,
    sin,
    k_cache,
    v_cache,
    slot_mapping,
    block_tables,
    seq_lens,
    *,
    scale,
    max_seq_len,
    window=None,
    softcap=None,
    mrope_section=None,
    mrope_interleaved=False,
    arrivals=None,
):
    sequences, heads, dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if sequences == 0:
        return out
    group = heads // kv_heads
    programs, processors = sequences * kv_heads, num_processors(q.device)
    tile, splits = tiling(dim, group, q.element_size(), programs, processors, max_seq_len)
    partial, stats = out, out
    if splits > 1:
        partial = torch.empty((sequences, heads, splits, dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((sequences, heads, splits, 2), dtype=torch.float32, device=q.device)
        if arrivals is None:
            arrivals = torch.zeros((sequences, kv_heads), dtype=torch.int32, device=q.device)
        assert arrivals.is_contiguous() and arrivals.shape[0] >= sequences and arrivals.shape[1] == kv_heads
    section = mrope_section or (0, 0, 0)
    launch(
        _decode_kernel,
        (sequences, kv_heads, splits),
        q,
        k,
        v,
        positions,
        cos,
        sin,
        k_cache,
        v_cache,
        slot_mapping,
        block_tables,
        seq_lens,
        out,
        partial,
        stats,
        out if splits == 1 else arrivals,
        splits,
        scale * LOG2E,
        0.0 if softcap is None else softcap * LOG2E,
        0 if window is None else window,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        positions.stride(0) if mrope_section is not None else 0,
        positions.stride(-1),
        cos.stride(0),
        block_tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PAD=triton.next_power_of_2(group),
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        HALF=cos.shape[-1],
        SECTION_T=section[0],
        SECTION_H=section[1],
        SECTION_W=section[2],
        MROPE=mrope_section is not None,
        INTERLEAVED=mrope_interleaved,
        BLOCK_SIZE=block_size,
        ROWS=tile.rows,
        KEYS=tile.keys,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        SPLIT=splits > 1,
        # As many as the registers hold.
        MERGED=max(4, tile.warps),
        # A single warp has no registers for it.
        AHEAD=tile.warps > 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlap(q),
    )
    return out


@triton.jit
def _rotate(x, partner, cos, sin):
    """``x`` rotated; products and the sum are rounded where torch rounds them. ``sin`` carries the sign."""
    product = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    other = (partner.to(tl.float32) * sin).to(x.dtype).to(tl.float32)
    return (product + other).to(x.dtype)


# Batch sizes differ in this number; a kernel compiled for each would make a long start.
@triton.jit(do_not_specialize=["splits"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    table_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    arrivals_ptr,
    splits,
    scale,
    cap,
    window,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    axis_stride,
    position_stride,
    angle_row,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    MROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGED: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    dtype = q_ptr.dtype.element_ty
    column = tl.arange(0, DIM_PAD)
    in_head = column < DIM
    # The kernel ahead makes q, k and v. What those before it made is there already.
    old = tl.load(seq_lens_ptr + sequence) - 1
    turns = column < 2 * HALF
    cos, sin = load_angles(
        positions_ptr,
        cos_ptr,
        sin_ptr,
        sequence,
        axis_stride,
        position_stride,
        angle_row,
        column % HALF,
        turns,
        SECTION_T,
        SECTION_H,
        SECTION_W,
        MROPE,
        INTERLEAVED,
    )
    cos = tl.where(turns, cos.to(dtype).to(tl.float32), 1.0)
    sin = sin.to(dtype).to(tl.float32)
    sin = tl.where(column < HALF, -sin, sin)
    partner = tl.where(turns, tl.where(column < HALF, column + HALF, column - HALF), column)
    slot = tl.load(slot_ptr + sequence)
    # Keys of the cache that are in sight, and this program's share of them.
    start = 0
    if WINDOW:
        start = tl.maximum(old - window + 1, 0) // KEYS * KEYS
    share = tl.maximum(tl.cdiv(tl.cdiv(old - start, KEYS), splits), 1) * KEYS
    used = tl.maximum(tl.cdiv(old - start, share), 1)
    start = start + split * share
    end = tl.minimum(start + share, old)
    last = tl.maximum((end - 1) // KEYS * KEYS, start)
    head_stride = BLOCK_SIZE * DIM
    block_stride = KV_HEADS * BLOCK_SIZE * DIM
    k_base = k_cache_ptr + kv_head * head_stride
    v_base = v_cache_ptr + kv_head * head_stride
    table = table_ptr + sequence * table_row
    if AHEAD:
        last_k, last_v = load_keys(
            k_base,
            v_base,
            table,
            last,
            end,
            block_stride,
            DIM,
            DIM_PAD,
            BLOCK_SIZE,
            KEYS,
            True,
        )
    wait_for_previous(OVERLAP)
    if split >= used:
        return

    row = tl.arange(0, ROWS)
    live = row < GROUP
    head = kv_head * GROUP + row
    q_mask = live[:, None] & in_head[None, :]
    q_row = q_ptr + sequence * q_token + head[:, None] * q_head
    q = tl.load(q_row + column[None, :], mask=q_mask, other=0.0)
    q_partner = tl.load(q_row + partner[None, :], mask=q_mask, other=0.0)
    q = _rotate(q, q_partner, cos[None, :], sin[None, :])

    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if split == 0:
        k_row = k_ptr + sequence * k_token + kv_head * k_head
        k = tl.load(k_row + column, mask=in_head, other=0.0)
        k = _rotate(k, tl.load(k_row + partner, mask=in_head, other=0.0), cos, sin)
        v = tl.load(v_ptr + sequence * v_token + kv_head * v_head + column, mask=in_head, other=0.0)
        if slot >= 0:
            place = slot // BLOCK_SIZE * block_stride + kv_head * head_stride + slot % BLOCK_SIZE * DIM
            tl.store(k_cache_ptr + place + column, k, mask=in_head)
            tl.store(v_cache_ptr + place + column, v, mask=in_head)
        top = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
        if SOFTCAP:
            top = cap * (2.0 * tl.sigmoid(2.0 * top / cap) - 1.0)
        total += 1.0
        acc += v.to(tl.float32)[None, :]

    position = tl.zeros([ROWS], tl.int32) + old
    if AHEAD:
        acc, top, total = accumulate(
            acc,
            top,
            total,
            q,
            last_k,
            last_v,
            last,
            position,
            end,
            scale,
            cap,
            window,
            KEYS,
            True,
            WINDOW,
            SOFTCAP,
        )
    for first_key in range(start, last, KEYS):
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
            end,
            scale,
            cap,
            window,
            block_stride,
            DIM,
            DIM_PAD,
            BLOCK_SIZE,
            KEYS,
            WINDOW,
            WINDOW,
            SOFTCAP,
        )
    if not AHEAD:
        for first_key in range(last, end, KEYS):
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
                end,
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

    HEADS: tl.constexpr = KV_HEADS * GROUP
    alone = used == 1
    if alone:
        target = out_ptr + (sequence * HEADS + head[:, None]) * DIM + column[None, :]
        tl.store(target, (acc / total[:, None]).to(dtype), mask=q_mask)
    if SPLIT:
        if not alone:
            place = (sequence * HEADS + head) * splits + split
            tl.store(partial_ptr + place[:, None] * DIM + column[None, :], acc, mask=q_mask)
            tl.store(stats_ptr + place * 2, top, mask=live)
            tl.store(stats_ptr + place * 2 + 1, total, mask=live)
            # All threads have written before one of them says so.
            tl.debug_barrier()
            arrival = arrivals_ptr + sequence * KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == used - 1:
                tl.store(arrival, 0)
                _merge(
                    partial_ptr,
                    stats_ptr,
                    out_ptr,
                    sequence * HEADS + kv_head * GROUP,
                    splits,
                    used,
                    GROUP,
                    GROUP_PAD,
                    DIM,
                    DIM_PAD,
                    MERGED,
                )


@triton.jit
def _merge(
    partial_ptr,
    stats_ptr,
    out_ptr,
    first_head,
    splits,
    used,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Weighs the ``used`` splits of a group of heads by their maxima and sums, ``MERGED`` at a time: all that is
    known of them is asked for at once."""
    row = tl.arange(0, GROUP_PAD)
    live = row < GROUP
    head = first_head + row
    column = tl.arange(0, DIM_PAD)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    # Rows beyond the group see nothing; what they come to is not stored.
    top = tl.where(live, float("-inf"), 0.0)
    for first in range(0, used, MERGED):
        part = first + tl.arange(0, MERGED)
        here = live[:, None] & (part < used)[None, :]
        source = head[:, None] * splits + part[None, :]
        tops = tl.load(stats_ptr + source * 2, mask=here, other=float("-inf"))
        totals = tl.load(stats_ptr + source * 2 + 1, mask=here, other=0.0)
        mask = here[:, :, None] & (column < DIM)[None, None, :]
        sums = tl.load(partial_ptr + source[:, :, None] * DIM + column[None, None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, axis=1))
        weights = tl.exp2(tops - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(totals * weights, axis=1)
        acc = acc * decay[:, None] + tl.sum(sums * weights[:, :, None], axis=1)
        top = higher
    target = out_ptr + head[:, None] * DIM + column[None, :]
    kept = live[:, None] & (column < DIM)[None, :]
    tl.store(target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=kept)
