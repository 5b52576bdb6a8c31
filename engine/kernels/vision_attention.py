"""Full attention inside each of several segments (images, or windows of them) in one launch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import num_sms
from engine.kernels.launch import is_compiling, launch
from engine.kernels.paged import LOG2E
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.tile import AttentionTile

#: Most shapes use one of these two tiles.
_LARGE, _SMALL = AttentionTile(128, 64, 8, 3), AttentionTile(64, 64, 4, 3)


def vision_attention_reference(q, k, v, cu_seqlens, *, max_len, scale):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for first, last in pairwise(cu_seqlens.tolist()):
        if last > first:
            parts = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
            out[first:last] = F.scaled_dot_product_attention(*parts, scale=scale)[0].transpose(0, 1)
    return out


def choose_tile(head_dim: int, max_len: int, heads: int, itemsize: int, *, sms: int) -> AttentionTile:
    """Choose the tile of a problem.

    It is the faster of two for 44 of 48 problems of one to four images on an H100, by up to a third of the
    time.

    Args:
        heads: heads times segments.
        itemsize: bytes of an element.
        sms: SMs of the GPU.
    """
    if head_dim > 128 or itemsize > 2:
        return AttentionTile(32, 32, 4, 2)
    # An SM runs three small programs at a time, or two large ones. Small ones finish sooner, but a second
    # wave with few of them would take half as long again; large ones may then need only one wave.
    second_wave = triton.cdiv(max_len, _SMALL.rows) * heads > 3 * sms
    fits = triton.cdiv(max_len, _LARGE.rows) * heads <= 2 * sms
    return _LARGE if second_wave and fits else _SMALL


def vision_attention_triton(q, k, v, cu_seqlens, *, max_len, scale):
    """See :func:`engine.kernels.dispatch.vision_attention`."""
    tokens, heads, dim = q.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    segments = cu_seqlens.shape[0] - 1
    if tokens == 0 or segments == 0:
        return out
    main, rest = head_parts(dim)
    chosen = choose_tile(dim, max_len, heads * segments, q.element_size(), sms=num_sms(q.device))
    # When compiling ahead of time, compile the kernel for other numbers of segments too.
    for tile in (_LARGE, _SMALL) if chosen in (_LARGE, _SMALL) and is_compiling() else (chosen,):
        launch(
            _vision_kernel, (triton.cdiv(max_len, tile.rows), heads, segments),
            q_ptr=q, k_ptr=k, v_ptr=v, bounds_ptr=cu_seqlens, out_ptr=out, scale=scale * LOG2E,
            q_token=q.stride(0), k_token=k.stride(0), v_token=v.stride(0),
            # constexpr strides let the compiler prove that a head's rows are aligned to 16 bytes.
            Q_HEAD=q.stride(1), K_HEAD=k.stride(1), V_HEAD=v.stride(1),
            HEADS=heads, DIM=dim, MAIN=main, REST=rest, ROWS=tile.rows, KEYS=tile.keys,
            num_warps=tile.warps, num_stages=tile.stages, **pdl_options(q),
        )  # fmt: skip
    return out


def head_parts(dim: int) -> tuple[int, int]:
    """Cut a head into two powers of two, 0 for no second part.

    80 is 64 + 16, and 72 is the same with 8 columns of padding: both cost less than padding to 128.
    """
    main = max(16, 1 << (dim.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(dim - main)) if dim > main else 0
    return (main, rest) if rest < main else (2 * main, 0)


@triton.jit
def _attend(
    acc, acc_rest, row_max, row_sum, q, q_rest, k_start, v_start, first_key, length, scale, k_token, v_token,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys and values to the online softmax; without ``MASKED`` it lies wholly inside the
    segment."""
    key = first_key + tl.arange(0, KEYS)
    in_range = key < length
    main = tl.arange(0, MAIN)
    k_row = k_start + key[None, :] * k_token
    v_row = v_start + key[:, None] * v_token
    if MASKED or MAIN > DIM:
        k = tl.load(k_row + main[:, None], mask=in_range[None, :] & (main < DIM)[:, None], other=0.0)
        v = tl.load(v_row + main[None, :], mask=in_range[:, None] & (main < DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_row + main[:, None])
        v = tl.load(v_row + main[None, :])
    scores = tl.dot(q, k, input_precision="ieee")
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        if MASKED or MAIN + REST > DIM:
            k_rest = tl.load(k_row + rest[:, None], mask=in_range[None, :] & (rest < DIM)[:, None], other=0.0)
            v_rest = tl.load(v_row + rest[None, :], mask=in_range[:, None] & (rest < DIM)[None, :], other=0.0)
        else:
            k_rest = tl.load(k_row + rest[:, None])
            v_rest = tl.load(v_row + rest[None, :])
        scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
    if MASKED:
        scores = tl.where(in_range[None, :], scores, float("-inf"))
    # Scaling here and in the subtraction below costs one multiply-add per score.
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    probs = tl.exp2(scores * scale - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(probs, axis=1)
    probs = probs.to(v.dtype)
    acc = tl.dot(probs, v, acc * decay[:, None], input_precision="ieee")
    if REST > 0:
        acc_rest = tl.dot(probs, v_rest, acc_rest * decay[:, None], input_precision="ieee")
    return acc, acc_rest, new_max, row_sum


@triton.jit
def _vision_kernel(
    q_ptr, k_ptr, v_ptr, bounds_ptr, out_ptr, scale, q_token, k_token, v_token,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries, head and segment. MAIN, REST: see :func:`head_parts`."""
    wait_for_previous(PDL)
    segment = tl.program_id(2)
    head = tl.program_id(1)
    begin = tl.load(bounds_ptr + segment)
    length = tl.load(bounds_ptr + segment + 1) - begin
    first = tl.program_id(0) * ROWS
    if first >= length:
        return
    row = first + tl.arange(0, ROWS)
    main = tl.arange(0, MAIN)
    row_mask = (row < length)[:, None]
    main_mask = row_mask & (main < DIM)[None, :]
    base = begin.to(tl.int64)
    q_row = q_ptr + (base + row)[:, None] * q_token + head * Q_HEAD
    q = tl.load(q_row + main[None, :], mask=main_mask, other=0.0)
    k_start = k_ptr + base * k_token + head * K_HEAD
    v_start = v_ptr + base * v_token + head * V_HEAD
    acc = tl.zeros([ROWS, MAIN], tl.float32)
    # Without a second part these are placeholders that nothing reads.
    q_rest = q
    acc_rest = acc
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        rest_mask = row_mask & (rest < DIM)[None, :]
        q_rest = tl.load(q_row + rest[None, :], mask=rest_mask, other=0.0)
        acc_rest = tl.zeros([ROWS, REST], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    whole = length // KEYS * KEYS
    for first_key in range(0, whole, KEYS):
        acc, acc_rest, row_max, row_sum = _attend(
            acc, acc_rest, row_max, row_sum, q, q_rest, k_start, v_start, first_key, length, scale,
            k_token, v_token, DIM, MAIN, REST, KEYS, MASKED=False,
        )  # fmt: skip
    if whole < length:
        acc, acc_rest, row_max, row_sum = _attend(
            acc, acc_rest, row_max, row_sum, q, q_rest, k_start, v_start, whole, length, scale,
            k_token, v_token, DIM, MAIN, REST, KEYS, MASKED=True,
        )  # fmt: skip
    out_row = out_ptr + ((base + row)[:, None] * HEADS + head) * DIM
    dtype = out_ptr.dtype.element_ty
    tl.store(out_row + main[None, :], (acc / row_sum[:, None]).to(dtype), mask=main_mask)
    if REST > 0:
        tl.store(out_row + rest[None, :], (acc_rest / row_sum[:, None]).to(dtype), mask=rest_mask)
