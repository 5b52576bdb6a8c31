"""Full attention inside each of many segments (pictures, or windows of them) in one launch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.dispatch import use_triton
from engine.kernels.launch import is_compiling, launch
from engine.kernels.overlap import overlap, wait_for_previous
from engine.kernels.tiling import Tiling, num_processors

_LOG2E = 1.4426950408889634
#: One of these it is for most problems: the large or the small one.
_TILES = Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 3)


def vision_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_len: int,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of each token over all tokens of its segment.

    Args:
        q, k, v: ``(T, H, D)``; strided views whose last dimension is contiguous.
        cu_seqlens: ``(B + 1,)`` int32, where segments begin; ``cu_seqlens[B] == T``.
        max_len: at least the longest segment, known to the host.
        scale: multiplies the scores.

    Returns:
        ``(T, H, D)`` contiguous.
    """
    run = vision_attention_triton if use_triton(q) else vision_attention_reference
    return run(q, k, v, cu_seqlens, max_len=max_len, scale=scale)


def vision_attention_reference(q, k, v, cu_seqlens, *, max_len, scale):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = cu_seqlens.tolist()
    for first, last in pairwise(bounds):
        if last > first:
            parts = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
            out[first:last] = F.scaled_dot_product_attention(*parts, scale=scale)[0].transpose(0, 1)
    return out


def tiling(head_dim: int, max_len: int, groups: int, itemsize: int, *, processors: int) -> Tiling:
    """The tile for a problem with so many heads of segments; the one place where this is decided.

    The better of two for 44 of 48 problems of one to four pictures on an H100, by up to a third of the time.

    Args:
        processors: that there are to be filled.
    """
    if head_dim > 128 or itemsize > 2:
        return Tiling(32, 32, 4, 2)
    large, small = _TILES
    # A processor holds three small tiles at a time, or two large ones. Small ones are through sooner, but the few
    # that are left for a second round would take half as long again; large ones may need none.
    second_round = triton.cdiv(max_len, small.rows) * groups > 3 * processors
    fits = triton.cdiv(max_len, large.rows) * groups <= 2 * processors
    return large if second_round and fits else small


def vision_attention_triton(q, k, v, cu_seqlens, *, max_len, scale):
    tokens, heads, dim = q.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    segments = cu_seqlens.shape[0] - 1
    if tokens == 0 or segments == 0:
        return out
    main, rest = head_parts(dim)
    processors = num_processors(q.device)
    wanted = tiling(dim, max_len, heads * segments, q.element_size(), processors=processors)
    # Ahead of time the kernel for other segments is compiled as well.
    for tile in _TILES if wanted in _TILES and is_compiling() else (wanted,):
        launch(
            _vision_kernel,
            (triton.cdiv(max_len, tile.rows), heads, segments),
            q,
            k,
            v,
            cu_seqlens,
            out,
            scale * _LOG2E,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            # Known to the compiler they tell how a head's rows are aligned, of which 16 bytes are read at once.
            Q_HEAD=q.stride(1),
            K_HEAD=k.stride(1),
            V_HEAD=v.stride(1),
            HEADS=heads,
            DIM=dim,
            MAIN=main,
            REST=rest,
            ROWS=tile.rows,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **overlap(q),
        )
    return out


def head_parts(dim: int) -> tuple[int, int]:
    """The powers of two, 0 for none, that a head is cut into: 80 is 64 + 16 and 72 the same with 8 of padding,
    which costs less than padding them to 128."""
    main = max(16, 1 << (dim.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(dim - main)) if dim > main else 0
    return (main, rest) if rest < main else (2 * main, 0)


@triton.jit
def _attend(
    acc,
    acc_rest,
    top,
    total,
    q,
    q_rest,
    k_start,
    v_start,
    first_key,
    length,
    scale,
    k_token,
    v_token,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys into the running softmax; an unmasked one lies wholly inside of the segment."""
    place = first_key + tl.arange(0, KEYS)
    inside = place < length
    main = tl.arange(0, MAIN)
    k_row = k_start + place[None, :] * k_token
    v_row = v_start + place[:, None] * v_token
    if MASKED or MAIN > DIM:
        k = tl.load(k_row + main[:, None], mask=inside[None, :] & (main < DIM)[:, None], other=0.0)
        v = tl.load(v_row + main[None, :], mask=inside[:, None] & (main < DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_row + main[:, None])
        v = tl.load(v_row + main[None, :])
    scores = tl.dot(q, k, input_precision="ieee")
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        if MASKED or MAIN + REST > DIM:
            k_rest = tl.load(k_row + rest[:, None], mask=inside[None, :] & (rest < DIM)[:, None], other=0.0)
            v_rest = tl.load(v_row + rest[None, :], mask=inside[:, None] & (rest < DIM)[None, :], other=0.0)
        else:
            k_rest = tl.load(k_row + rest[:, None])
            v_rest = tl.load(v_row + rest[None, :])
        scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    # The scale is positive: it goes into the same multiply-add as the subtraction.
    higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    decay = tl.exp2(top - higher)
    total = total * decay + tl.sum(weights, axis=1)
    weights = weights.to(v.dtype)
    acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
    if REST > 0:
        acc_rest = tl.dot(weights, v_rest, acc_rest * decay[:, None], input_precision="ieee")
    return acc, acc_rest, higher, total


@triton.jit
def _vision_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bounds_ptr,
    out_ptr,
    scale,
    q_token,
    k_token,
    v_token,
    Q_HEAD: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    segment = tl.program_id(2)
    head = tl.program_id(1)
    begin = tl.load(bounds_ptr + segment)
    length = tl.load(bounds_ptr + segment + 1) - begin
    first = tl.program_id(0) * ROWS
    if first >= length:
        return
    row = first + tl.arange(0, ROWS)
    main = tl.arange(0, MAIN)
    row_ok = (row < length)[:, None]
    main_ok = (main < DIM)[None, :]
    base = begin.to(tl.int64)
    q_row = q_ptr + (base + row)[:, None] * q_token + head * Q_HEAD
    q = tl.load(q_row + main[None, :], mask=row_ok & main_ok, other=0.0)
    k_start = k_ptr + base * k_token + head * K_HEAD
    v_start = v_ptr + base * v_token + head * V_HEAD
    acc = tl.zeros([ROWS, MAIN], tl.float32)
    # Without a rest these stand in for it, and nothing reads them.
    q_rest = q
    acc_rest = acc
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        rest_ok = row_ok & (rest < DIM)[None, :]
        q_rest = tl.load(q_row + rest[None, :], mask=rest_ok, other=0.0)
        acc_rest = tl.zeros([ROWS, REST], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    whole = length // KEYS * KEYS
    for first_key in range(0, whole, KEYS):
        acc, acc_rest, top, total = _attend(
            acc,
            acc_rest,
            top,
            total,
            q,
            q_rest,
            k_start,
            v_start,
            first_key,
            length,
            scale,
            k_token,
            v_token,
            DIM,
            MAIN,
            REST,
            KEYS,
            False,
        )
    if whole < length:
        acc, acc_rest, top, total = _attend(
            acc,
            acc_rest,
            top,
            total,
            q,
            q_rest,
            k_start,
            v_start,
            whole,
            length,
            scale,
            k_token,
            v_token,
            DIM,
            MAIN,
            REST,
            KEYS,
            True,
        )
    out_row = out_ptr + ((base + row)[:, None] * HEADS + head) * DIM
    dtype = out_ptr.dtype.element_ty
    tl.store(out_row + main[None, :], (acc / total[:, None]).to(dtype), mask=row_ok & main_ok)
    if REST > 0:
        tl.store(out_row + rest[None, :], (acc_rest / total[:, None]).to(dtype), mask=rest_ok)
