"""The operations that have several kernels; each function here chooses the kernel of its operation.

The table in :mod:`engine.kernels` lists the choices. A new variant is a new file with the kernel, a condition
here and a line in that table. A kernel's file says what it supports; this file says when it is the fastest.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from engine.kernels import (
    even_gemm,
    expert_gemm,
    fp8_attention,
    fp8_mma,
    gemm_activation,
    image_attention,
    int4_mma,
    int4_mma_ring,
    int4_wgmma,
    prefill_attention,
    ring_gemm,
    ring_shares,
    wide_gemm,
)
from engine.kernels.act_mul import act_mul, act_rounded
from engine.kernels.activation import ACTIVATIONS
from engine.kernels.decode_attention import decode_attention_reference, decode_attention_triton
from engine.kernels.delta_prefill import delta_prefill_triton
from engine.kernels.delta_rule import DeltaGates, delta_rule_reference, delta_step_triton
from engine.kernels.device import MEMORY_BOUND_ROWS, num_sms, use_triton
from engine.kernels.even_gemm import even_gemm_gluon
from engine.kernels.expert_gemm import grouped_experts_gluon
from engine.kernels.expert_gemv import expert_gemv_triton
from engine.kernels.experts import ExpertMatrices, experts_reference
from engine.kernels.fp8 import (
    MAX_UNROUNDED,
    RoundedRows,
    Scale,
    dequantised_gemm,
    quantise_rows,
    reads_fp8,
    scaled_gemm,
    supports_scaled,
)
from engine.kernels.fp8_attention import decode_attention_gluon, single_attention_gluon
from engine.kernels.fp8_mma import fp8_mma_gluon
from engine.kernels.gemm_activation import gemm_activation_reference, gemm_activation_triton
from engine.kernels.gemv import gemv_sum_triton, gemv_triton
from engine.kernels.grouped_gemm import grouped_experts_triton
from engine.kernels.image_attention import image_attention_gluon
from engine.kernels.image_plan import choose_plan, possible_plans
from engine.kernels.int4 import Int4Scale, dequantise_int4
from engine.kernels.int4_experts import int4_expert_gemv_triton, int4_grouped_gemm_triton
from engine.kernels.int4_gemm import int4_gemm_triton
from engine.kernels.int4_gemv import int4_gemv_triton
from engine.kernels.int4_mma import int4_mma_gluon
from engine.kernels.int4_mma_ring import int4_mma_ring_gluon
from engine.kernels.int4_wgmma import int4_wgmma_gluon
from engine.kernels.launch import is_compiling
from engine.kernels.layer_norm import add_layer_norm, layer_norm_rounded
from engine.kernels.norm_gemv import norm_gemv_triton
from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.paged_attention import paged_attention_reference, paged_attention_triton
from engine.kernels.peer_reduce import MAX_SENT, PeerBuffers
from engine.kernels.prefill_attention import prefill_attention_gluon
from engine.kernels.recurrent_state import StateCache
from engine.kernels.ring_gemm import ring_gemm_gluon, tile_gemm_gluon
from engine.kernels.ring_shares import ring_shares_gluon
from engine.kernels.rms_norm import HeadNorms, rms_norm, rms_norm_rounded
from engine.kernels.rotary import RotaryTable
from engine.kernels.route import Routing
from engine.kernels.skinny_gemm import skinny_gemm_triton
from engine.kernels.split_sums import SplitSums, Unfinished, whole
from engine.kernels.vision_attention import vision_attention_reference, vision_attention_triton
from engine.kernels.wide_gemm import wide_gemm_gluon

#: With more new tokens of one sequence the prefill kernel is faster; shorter prompts don't fill its tiles. Up to the
#: second number it takes tiles of rows by pairs, beyond it tiles that share all keys.
SHORT_PROMPT, LONG_PROMPT = 256, 1024
#: Of several prompts up to this length the general kernel is faster, where heads are wide.
MIDDLE_PROMPT = 512
#: With more tokens, or more pairs than half the experts, tokens that share an expert should share its reading.
MAX_EXPERT_GEMV_TOKENS = 4
#: The kernel for Hopper GPUs is the faster one with more rows an expert than this, on average.
MIN_EXPERT_GEMM_ROWS = 8
#: With more rows, dequantising an int4 weight once takes less time than in each tile of rows.
MAX_INT4_ROWS = 128
#: For wider outputs (the LM head) torch's GEMM already reaches memory bandwidth.
MAX_SKINNY_OUTPUTS = 1 << 16
#: Triton's compiler knows that rows are aligned where their lengths are multiples of this.
ALIGNED_INPUTS = 16


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    positions: torch.Tensor,
    table: RotaryTable,
    cache: KVCache,
    meta: AttentionMetadata,
    *,
    scale: float,
    norms: HeadNorms | None = None,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Rotate each sequence's one new token, write it to the cache, and attend to all tokens up to it.

    It equals :func:`~engine.kernels.rms_norm.head_norms`, if there are ``norms``,
    :func:`~engine.kernels.kv_write.rotary_kv_write` and :func:`paged_attention`, one after the other. ``q``
    and ``k`` are undefined afterwards.

    Args:
        q: ``(S, Hq, D)``; last dimension contiguous, also of ``k`` and ``v``.
        k, v: ``(S, Hkv, D)``; ``Hq`` is a multiple of ``Hkv``. None: the tokens' keys and values are in the
            cache already.
        positions: ``(S,)``, or ``(axes, S)`` if the table has sections; int64.
        cache: changed in place.
        meta: a batch with one new token per sequence, so ``T == S``.
        scale: multiplies the scores; positive.
        norms: of the heads of ``q`` and ``k``, before the rotation, or behind it if they are ``last``.
        window: a query at position p sees keys at positions greater than ``p - window``.
        cap: a scaled score ``s`` becomes ``cap * tanh(s / cap)`` (Gemma 2); None leaves scores as they are.

    Returns:
        ``(S, Hq, D)`` in the dtype of ``q``.
    """
    run = decode_attention_reference
    if use_triton(q):
        run = decode_attention_gluon if fp8_attention.supports(q, cache) else decode_attention_triton
    return run(q, k, v, positions, table, cache, meta, scale=scale, norms=norms, window=window, cap=cap)


def paged_attention(
    q: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each sequence's new tokens over all its tokens up to themselves, or up to ``meta.key_ends``.

    The new tokens are the last of each sequence; their keys and values are in the cache already.

    Args:
        q: ``(T, Hq, D)``, last dimension contiguous; ``Hq`` is a multiple of ``Hkv``. Rows from
            ``meta.query_start[S]`` on are padding.
        scale: multiplies the scores; positive.
        window: a query at position p sees keys at positions greater than ``p - window``.
        cap: a scaled score ``s`` becomes ``cap * tanh(s / cap)`` (Gemma 2); None leaves scores as they are.
        out: ``(T, Hq, D)`` contiguous, to write to; padding rows are not written.

    Returns:
        ``(T, Hq, D)`` in the dtype of ``q``.
    """
    if not use_triton(q):
        return paged_attention_reference(q, cache, meta, scale=scale, window=window, cap=cap, out=out)
    if window is None and cap is None and meta.key_ends is None and prefill_attention.supports(q, cache):
        paired = meta.max_query_len <= LONG_PROMPT
        # The general kernel keeps more tiles on an SM. That counts once they make several rounds.
        rounds = q.shape[0] * q.shape[1] / (128 * num_sms(q.device))
        crowded = paired and (
            rounds > 1 if q.shape[2] < 128 else rounds > 2 and meta.max_query_len <= MIDDLE_PROMPT
        )
        if is_compiling():
            # Compile the kernels for other lengths too.
            for each in (False, True):
                out = prefill_attention_gluon(q, cache, meta, scale=scale, paired=each, out=out)
        elif meta.max_query_len > SHORT_PROMPT and not crowded and not meta.many_sequences:
            return prefill_attention_gluon(q, cache, meta, scale=scale, paired=paired, out=out)
    limits = {"scale": scale, "window": window, "cap": cap}
    # A tile of 64 rows for one token reads keys at less than half the memory's rate.
    apart = meta.max_query_len > 1 and len(meta.seq_lens) > 1 and meta.key_ends is None and len(q) > 0
    apart = apart and fp8_attention.supports(q, cache)
    if apart:
        out = single_attention_gluon(q, cache, meta, **limits, out=out)
        if is_compiling():
            # Compile the kernel for steps of one sequence too.
            paged_attention_triton(q, cache, meta, **limits, out=out)
    return paged_attention_triton(q, cache, meta, **limits, out=out, singles=not apart)


def vision_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_len: int,
    scale: float,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of each token over all tokens of its segment.

    Args:
        q, k, v: ``(T, H, D)``; may be strided views with a contiguous last dimension.
        cu_seqlens: ``(B + 1,)`` int32, where segments begin; ``cu_seqlens[B] == T``.
        max_len: upper bound of the segments' lengths; a host integer.
        scale: multiplies the scores; positive.
        counters: see :func:`engine.kernels.shares.part_counters`; None: one large segment takes longer.

    Returns:
        ``(T, H, D)`` contiguous, in the dtype of ``q``.
    """
    if not use_triton(q):
        return vision_attention_reference(q, k, v, cu_seqlens, max_len=max_len, scale=scale)
    segments = len(cu_seqlens) - 1
    if segments > 0 and image_attention.supports(q, k, v):
        counted = counters is not None
        run = partial(image_attention_gluon, q, k, v, cu_seqlens, scale=scale, counters=counters)
        if is_compiling():
            # Compile the kernels for other images too.
            for each in possible_plans(q.shape[2], segments, counted=counted):
                run(plan=each)
        else:
            plan = choose_plan(len(q), segments, *q.shape[1:], sms=num_sms(q.device), counted=counted)
            if plan is not None:
                return run(plan=plan)
    return vision_attention_triton(q, k, v, cu_seqlens, max_len=max_len, scale=scale)


def delta_rule(
    qkv: torch.Tensor, gates: DeltaGates, cache: StateCache, meta: AttentionMetadata
) -> torch.Tensor:
    """Apply the gated delta rule to each sequence's new tokens; see :mod:`engine.kernels.delta_rule`.

    Args:
        qkv: ``(T, C)``, last dimension contiguous: queries and keys of the key heads, then values, after
            the convolution. Queries and keys are scaled to length 1, queries then by ``key_dim ** -0.5``.
        gates: of the ``T`` tokens.
        cache: ``recurrent`` is changed to the states after the new tokens.
        meta: ``state_rows`` names different rows, but for sequences without tokens.

    Returns:
        ``(T, heads, value_dim)`` contiguous, in the dtype of ``qkv``; rows of padding are undefined.
    """
    if not use_triton(qkv):
        return delta_rule_reference(qkv, gates, cache, meta)
    if meta.max_query_len == 1:
        return delta_step_triton(qkv, gates, cache, meta)
    return delta_prefill_triton(qkv, gates, cache, meta)


def linear(
    x: torch.Tensor | RoundedRows,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    counters: torch.Tensor | None = None,
    scale: Scale | Int4Scale | None = None,
) -> torch.Tensor:
    """Compute ``x @ weight.T + bias``, summed in float32, and the gate after it if there is one.

    Args:
        x: ``(T, K)``, last dimension contiguous; or the rows in fp8, where :func:`takes_rounded` says so.
        weight: ``(N, K)``, last dimension contiguous, dtype of ``x``; with ``scale`` fp8 or the words of int4.
        bias: ``(N,)``.
        activation: its Hugging Face name: activates the first half of the outputs and multiplies it by
            the second half, see :func:`engine.kernels.act_mul.act_mul`.
        counters: the layer's :func:`~engine.kernels.skinny_gemm.split_counters`. None: no split-K, which is
            slower for a few rows.
        scale: what an fp8 weight is multiplied by; the scales and zero points of an int4 weight.

    Returns:
        ``(T, N)``, or ``(T, N / 2)`` with an activation, in the dtype of ``x``.
    """
    if isinstance(x, RoundedRows):
        assert isinstance(scale, Scale)
        return _rounded_linear(x, weight, bias, activation, counters, scale)
    if isinstance(scale, Int4Scale):
        out = _int4_linear(x, weight, bias, counters, scale)
        return out if activation is None else act_mul(out, activation)
    rows = x.shape[0]
    memory_bound = rows <= MEMORY_BOUND_ROWS and use_triton(x) and (scale is None or reads_fp8(x.device))
    if takes_rounded(x, weight, scale):
        assert isinstance(scale, Scale)
        if use_triton(x) and fp8_mma.supports(x):
            return fp8_mma_gluon(x, weight, bias, activation=activation, scale=scale, dtype=x.dtype)
        return _rounded_linear(quantise_rows(x), weight, bias, activation, counters, scale)
    if _is_skinny(x, weight, scale):
        if scale is None and ring_shares.supports(x, weight, bias, gated=activation is not None):
            return ring_shares_gluon(x, weight, activation)
        return skinny_gemm_triton(x, weight, bias, activation=activation, counters=counters, scale=scale)
    if activation is not None and scale is None and use_triton(x) and wide_gemm.supports(x, weight):
        if is_compiling():
            # Between the few rows of skinny_gemm and the many of wide_gemm, torch's GEMM runs with a gate kernel: compile
            # that too.
            act_mul(x.new_empty((MEMORY_BOUND_ROWS + 1, len(weight))), activation)
        return wide_gemm_gluon(x, weight, bias, activation)
    if memory_bound and rows == 1:
        out = gemv_triton(x, weight, bias, scale)
    elif scale is None:
        out = F.linear(x, weight, bias)
    else:
        out = dequantised_gemm(x, weight, scale, bias)
    return out if activation is None else act_mul(out, activation)


def split_linear(
    x: torch.Tensor | RoundedRows,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    counters: torch.Tensor | None = None,
    scale: Scale | Int4Scale | None = None,
) -> torch.Tensor | SplitSums:
    """Compute :func:`linear` for a consumer that adds up what several programs have computed."""
    if isinstance(x, torch.Tensor) and x.shape[0] > 1 and takes_rounded(x, weight, scale):
        x = quantise_rows(x)
    if isinstance(x, RoundedRows):
        assert isinstance(scale, Scale)
        options = {"scale": scale, "row_scale": x.scale, "dtype": torch.bfloat16}
        if use_triton(x.numbers) and ring_gemm.supports(x.numbers, weight):
            return ring_gemm_gluon(x.numbers, weight, bias, **options)
        if 1 < len(x.numbers) <= MEMORY_BOUND_ROWS and use_triton(x.numbers):
            return skinny_gemm_triton(x.numbers, weight, bias, parts=True, **options)
    elif not isinstance(scale, Int4Scale) and _is_skinny(x, weight, scale):
        if scale is None and ring_gemm.supports(x, weight):
            return ring_gemm_gluon(x, weight, bias)
        return skinny_gemm_triton(x, weight, bias, scale=scale, parts=True)
    return linear(x, weight, bias, counters=counters, scale=scale)


def _is_skinny(x: torch.Tensor, weight: torch.Tensor, scale: Scale | None) -> bool:
    """Return whether there are a few rows of 16 bits.

    Where rows of a weight begin at any address, it is read by single elements: torch's GEMM is faster then. A
    weight in fp8 would have to be dequantised for that.
    """
    if scale is None and weight.shape[1] % ALIGNED_INPUTS:
        return False
    few = 1 < x.shape[0] <= MEMORY_BOUND_ROWS and use_triton(x) and (scale is None or reads_fp8(x.device))
    return few and x.element_size() == 2 and weight.shape[0] <= MAX_SKINNY_OUTPUTS


def sum_linear(
    x: torch.Tensor | RoundedRows,
    weight: torch.Tensor,
    peers: PeerBuffers,
    *,
    scale: Scale | Int4Scale | None = None,
) -> torch.Tensor | None:
    """Compute the sum over ranks of ``x @ weight.T``, where no separate all-reduce is needed.

    Args:
        x, weight, scale: see :func:`linear`.
        peers: buffers of all ranks, which make the same call with ``x`` and ``weight`` of their own.

    Returns:
        ``(T, N)`` on all ranks; None if the product is one for :func:`linear` and an all-reduce.
    """
    if not isinstance(x, torch.Tensor) or isinstance(scale, Int4Scale) or not use_triton(x):
        return None
    if x.shape[0] != 1 or takes_rounded(x, weight, scale) or (scale is not None and not reads_fp8(x.device)):
        return None
    fits = x.element_size() == 2 and weight.shape[0] % 8 == 0 and weight.shape[0] <= MAX_SENT
    return gemv_sum_triton(x, weight, scale, peers) if fits else None


def takes_rounded(
    x: torch.Tensor | Unfinished, weight: torch.Tensor, scale: Scale | Int4Scale | None
) -> bool:
    """Return whether :func:`linear` multiplies the rows ``x`` as :class:`RoundedRows`.

    To round rows takes a launch, which large weights alone make up for if there is one row.
    """
    return _may_round(x, weight, scale) and (x.shape[0] > 1 or weight.numel() > MAX_UNROUNDED)


def _may_round(x: torch.Tensor | Unfinished, weight: torch.Tensor, scale: Scale | Int4Scale | None) -> bool:
    """Return whether the rows ``x`` may be rounded, and multiplied by this weight then."""
    return isinstance(scale, Scale) and x.shape[0] > 0 and supports_scaled(x, weight, scale)


def _rounded_linear(
    x: RoundedRows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    counters: torch.Tensor | None,
    scale: Scale,
) -> torch.Tensor:
    rows = len(x.numbers)
    if rows <= MEMORY_BOUND_ROWS and use_triton(x.numbers):
        options = {"activation": activation, "scale": scale, "row_scale": x.scale, "dtype": torch.bfloat16}
        if fp8_mma.supports(x.numbers):
            return fp8_mma_gluon(x.numbers, weight, bias, **options)
        if activation is None and counters is None and ring_gemm.supports_tiles(x.numbers, weight):
            del options["activation"]
            return tile_gemm_gluon(x.numbers, weight, bias, **options)
        return skinny_gemm_triton(x.numbers, weight, bias, counters=counters, **options)
    if activation is not None and use_triton(x.numbers) and wide_gemm.supports_rounded(rows, weight):
        options = {"scale": scale, "row_scale": x.scale, "dtype": torch.bfloat16}
        return wide_gemm_gluon(x.numbers, weight, bias, activation, **options)
    if activation is None and use_triton(x.numbers) and even_gemm.supports(weight):
        sms = num_sms(weight.device)
        tile = even_gemm.choose_tile(rows, len(weight), sms)
        if is_compiling():
            # Compile the kernel for other numbers of rows too.
            for each in even_gemm.possible_tiles(len(weight), sms):
                even_gemm_gluon(x, weight, scale, bias, torch.bfloat16, tile=each)
        elif tile is not None:
            return even_gemm_gluon(x, weight, scale, bias, torch.bfloat16, tile=tile)
    out = scaled_gemm(x, weight, scale, bias, torch.bfloat16)
    return out if activation is None else act_mul(out, activation)


def _int4_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor | None,
    counters: torch.Tensor | None,
    scale: Int4Scale,
) -> torch.Tensor:
    if scale.order is not None:
        x = x.index_select(1, scale.order)
    if use_triton(x) and int4_mma_ring.supports(x, scale):
        return int4_mma_ring_gluon(x, words, scale, bias)
    if use_triton(x) and int4_wgmma.supports(x, scale):
        return int4_wgmma_gluon(x, words, scale, bias, counters=counters)
    if use_triton(x) and int4_mma.supports(x):
        return int4_mma_gluon(x, words, scale, bias)
    if use_triton(x) and x.shape[0] == 1:
        return int4_gemv_triton(x, words, scale, bias)
    if use_triton(x) and 1 < x.shape[0] <= MAX_INT4_ROWS and x.element_size() == 2:
        return int4_gemm_triton(x, words, scale, bias, counters=counters)
    return F.linear(x, dequantise_int4(words, scale, x.dtype), bias)


def norm_linear(
    x: torch.Tensor | Unfinished,
    residual: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    offset: float | None = None,
    centred: bool = False,
    scale: Scale | Int4Scale | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a linear layer of the norm of ``x + residual``, and that sum.

    One row: only ``x + residual`` is rounded to the dtype in between. Several rows: each operation rounds its
    own result, see :func:`linear`.

    Args:
        x: ``(T, K)``, last dimension contiguous; or what is to become that.
        residual: shape of ``x``, contiguous; None adds nothing.
        norm: ``(K,)``, scale of the norm; None for no norm.
        eps: added to the mean square.
        weight, bias, activation, scale: see :func:`linear`.
        offset: see :func:`~engine.kernels.rms_norm.rms_norm`.
        centred: the norm is a layer norm without shift, not an RMS norm.

    Returns:
        ``(T, N)``, or ``(T, N / 2)`` with an activation, and ``(T, K)``; both in the dtype of ``x``.
    """
    options = {"offset": offset, "centred": centred}
    if fuses_norm(x, weight, scale):
        return norm_gemv_triton(
            x, residual, norm, eps, weight, bias, activation=activation, scale=scale, **options
        )
    run = _norm_rounded if _may_round(x, weight, scale) else _norm
    normed, total = run(x, residual, norm, eps, **options)
    return linear(normed, weight, bias, activation=activation, scale=scale), total


def fuses_norm(x: torch.Tensor | Unfinished, weight: torch.Tensor, scale: Scale | Int4Scale | None) -> bool:
    """Return whether :func:`norm_linear` computes the norm where it is read, for each linear layer again."""
    if x.shape[0] != 1 or isinstance(x, SplitSums) or _may_round(x, weight, scale):
        return False
    return use_triton(weight) and (scale is None or (isinstance(scale, Scale) and reads_fp8(x.device)))


def _norm(
    x: torch.Tensor | Unfinished,
    residual: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    *,
    offset: float | None,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the norm of :func:`norm_linear`, and the sum."""
    if residual is not None:
        if centred:
            assert norm is not None
            return add_layer_norm(x, residual, norm, None, eps)
        return rms_norm(x, norm, eps, residual, offset=offset)
    total = whole(x)
    if norm is None:
        return total, total
    if centred:
        return F.layer_norm(total, norm.shape, norm, None, eps), total
    return rms_norm(total, norm, eps, offset=offset), total


def _norm_rounded(
    x: torch.Tensor | Unfinished,
    residual: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    *,
    offset: float | None,
    centred: bool,
) -> tuple[RoundedRows, torch.Tensor]:
    """Compute :func:`_norm` with its rows rounded to fp8."""
    if centred:
        assert norm is not None
        return layer_norm_rounded(x, residual, norm, None, eps)
    return rms_norm_rounded(x, norm, eps, residual, offset=offset)


def norm_gated_rounded(
    x: torch.Tensor | Unfinished,
    residual: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str,
    offset: float | None = None,
    centred: bool = False,
    scale: Scale | Int4Scale | None = None,
) -> tuple[RoundedRows, torch.Tensor]:
    """Compute :func:`norm_linear` with a gate, and round its rows to fp8 for the next layer."""
    if _may_round(x, weight, scale):
        assert isinstance(scale, Scale)
        rows, total = _norm_rounded(x, residual, norm, eps, offset=offset, centred=centred)
        return gated_rounded(rows, weight, bias, activation, scale), total
    out, total = norm_linear(
        x,
        residual,
        norm,
        eps,
        weight,
        bias,
        activation=activation,
        offset=offset,
        centred=centred,
        scale=scale,
    )
    return quantise_rows(out), total


def gated_rounded(
    x: RoundedRows, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, scale: Scale
) -> RoundedRows:
    """Compute :func:`linear` of rows in fp8 with a gate, and round its rows to fp8 for the next layer."""
    rows = len(x.numbers)
    if rows <= MEMORY_BOUND_ROWS or wide_gemm.supports_rounded(rows, weight):
        if is_compiling():
            # For the rows between, as in linear.
            middling = weight.new_empty((MEMORY_BOUND_ROWS + 1, len(weight)), dtype=torch.bfloat16)
            act_rounded(middling, activation, gated=True)
        return quantise_rows(linear(x, weight, bias, activation=activation, scale=scale))
    return act_rounded(linear(x, weight, bias, scale=scale), activation, gated=True)


def activated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    scale: Scale | None = None,
) -> torch.Tensor:
    """Compute ``activation(x @ weight.T + bias)``.

    Args:
        x: ``(..., K)``, last dimension contiguous; with ``scale`` ``(T, K)``.
        weight: ``(N, K)``, last dimension contiguous, dtype of ``x``; with ``scale`` fp8.
        bias: ``(N,)``.
        activation: a key of :data:`engine.kernels.activation.ACTIVATIONS`.
        scale: what an fp8 weight is multiplied by.

    Returns:
        ``(..., N)`` in the dtype of ``x``.
    """
    if scale is not None:
        return ACTIVATIONS[activation](linear(x, weight, bias, scale=scale))
    flat = x.flatten(0, -2)
    if use_triton(flat) and gemm_activation.supports(flat, weight):
        busy = gemm_activation.fills_gpu(flat.shape[0], weight.shape[0], num_sms(x.device))
        # When compiling ahead of time, compile the kernel for other numbers of rows too.
        if busy or is_compiling():
            out = gemm_activation_triton(flat, weight, bias, activation)
        if busy:
            return out.unflatten(0, x.shape[:-1])
    return gemm_activation_reference(x, weight, bias, activation)


def activated_rounded(
    x: RoundedRows, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, scale: Scale
) -> RoundedRows:
    """Compute :func:`activated_linear` of rows in fp8, and round its rows to fp8 for the next layer."""
    return act_rounded(linear(x, weight, bias, scale=scale), activation, gated=False)


def experts(
    x: torch.Tensor, routing: Routing, gate_up: ExpertMatrices, down: ExpertMatrices, activation: str
) -> torch.Tensor:
    """Compute ``sum_j weights[t, j] * down_e(activation(gate_e(x[t])) * up_e(x[t]))`` with ``e = ids[t, j]``.

    Args:
        x: ``(T, H)``, last dimension contiguous.
        routing: chooses ``ids`` and ``weights``, see :meth:`~engine.kernels.route.Routing.chosen`.
        gate_up: ``(E, 2 * I, H)``, gate first. Each expert may have its inputs in an order of its own.
        down: ``(E, H, I)``.
        activation: a key of :data:`engine.kernels.activation.ACTIVATIONS`.

    Returns:
        ``(T, H)`` in the dtype of ``x``.
    """
    packed = isinstance(gate_up.scale, Int4Scale) or isinstance(down.scale, Int4Scale)
    few = _few_pairs(len(x), routing.config.top_k, len(gate_up.weight)) and routing.factors is None
    if few and not packed and _readable(x, gate_up, down):
        return expert_gemv_triton(x, routing, gate_up, down, activation)
    return chosen_experts(x, *routing.chosen(), gate_up, down, activation)


def _few_pairs(tokens: int, top_k: int, count: int) -> bool:
    """Return whether each pair of a token and one of ``count`` experts is best a GEMV of its own."""
    return tokens == 1 or (tokens <= MAX_EXPERT_GEMV_TOKENS and 2 * tokens * top_k <= count)


def _readable(x: torch.Tensor, gate_up: ExpertMatrices, down: ExpertMatrices) -> bool:
    """Return whether Triton kernels run for ``x`` and read both kinds of matrices."""
    fp8 = isinstance(gate_up.scale, Scale) or isinstance(down.scale, Scale)
    same = isinstance(gate_up.scale, Int4Scale) == isinstance(down.scale, Int4Scale)
    return len(x) > 0 and use_triton(x) and same and (not fp8 or reads_fp8(x.device))


def chosen_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    activation: str,
) -> torch.Tensor:
    """Compute :func:`experts` for experts that are chosen.

    Args:
        ids: ``(T, top_k)`` int32 contiguous, experts of each token.
        weights: ``(T, top_k)`` float32 contiguous.
    """
    tokens, top_k = ids.shape
    if isinstance(gate_up.scale, Int4Scale) and gate_up.scale.order is not None:
        # Each pair of a token and an expert has a row of its own, in the expert's order.
        order, gate_up = gate_up.scale.order, replace(gate_up, scale=replace(gate_up.scale, order=None))
        rows = x.repeat_interleave(top_k, dim=0).gather(1, order[ids.flatten()])
        pairs = ids.view(-1, 1), weights.view(-1, 1)
        return chosen_experts(rows, *pairs, gate_up, down, activation).unflatten(0, (tokens, top_k)).sum(1)
    if not _readable(x, gate_up, down):
        run = experts_reference
    elif isinstance(gate_up.scale, Int4Scale):
        few = _few_pairs(tokens, top_k, len(gate_up.weight))
        run = int4_expert_gemv_triton if few else int4_grouped_gemm_triton
    elif expert_gemm.supports(x, gate_up) and expert_gemm.supports(x, down):
        # fp8 by fp8 is the faster one for few rows as well.
        fp8 = gate_up.scale is not None or down.scale is not None
        many = fp8 or tokens * top_k > MIN_EXPERT_GEMM_ROWS * len(gate_up.weight)
        # When compiling ahead of time, compile the kernels for other numbers of tokens too.
        if is_compiling() and not fp8:
            grouped_experts_triton(x, ids, weights, gate_up, down, activation)
        run = grouped_experts_gluon if many or is_compiling() else grouped_experts_triton
    else:
        run = grouped_experts_triton
    return run(x, ids, weights, gate_up, down, activation)
