"""The MLPs of a mixture of experts with weights in 4 bits: GEMVs for few tokens, a grouped GEMM for more.

See :mod:`engine.kernels.expert_gemv` and :mod:`engine.kernels.grouped_gemm`, which do the same with other weights,
and for int4 :mod:`engine.kernels.int4_gemv` and :mod:`engine.kernels.int4_gemm`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.expert_groups import experts_in_groups
from engine.kernels.experts import ExpertMatrices
from engine.kernels.grouped_gemm import HEIGHTS, choose_height
from engine.kernels.int4 import Int4Scale, int4_arguments, times_factors
from engine.kernels.int4_gemm import chunk_products
from engine.kernels.int4_gemv import add_words
from engine.kernels.int4_unpack import unpacks
from engine.kernels.launch import is_compiling, launch
from engine.kernels.paged import find_tile, query_tiles
from engine.kernels.pdl import pdl_options, wait_for_previous

#: GEMV: outputs per program, most words per step, warps.
_OUTPUTS, _WORDS, _WARPS = 2, 512, 2
#: Grouped GEMM: outputs of a tile, depth of the pipeline over chunks.
_TILE_OUTPUTS, _STAGES = 64, 4


def _arguments(matrices: ExpertMatrices) -> dict[str, Any]:
    assert isinstance(matrices.scale, Int4Scale) and matrices.scale.order is None
    return int4_arguments(matrices.weight.flatten(0, 1), matrices.scale)


def int4_expert_gemv_triton(x, ids, weights, gate_up: ExpertMatrices, down: ExpertMatrices, activation):
    """See :func:`engine.kernels.dispatch.experts`."""
    tokens, top_k = ids.shape
    width, inner_width = x.shape[1], down.inputs
    assert x.stride(1) == 1 and ids.is_contiguous() and weights.is_contiguous()
    inner = torch.empty((tokens * top_k, inner_width), dtype=x.dtype, device=x.device)
    launch(
        _int4_gate_kernel, (triton.cdiv(inner_width, _OUTPUTS), tokens * top_k),
        x_ptr=x, ids_ptr=ids, out_ptr=inner, outputs=inner_width, x_stride=x.stride(0), **_arguments(gate_up),
        TOP_K=top_k, ACTIVATION=activation, **_tile(gate_up), **pdl_options(x),
    )  # fmt: skip
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    launch(
        _int4_down_kernel, (triton.cdiv(width, _OUTPUTS), tokens),
        inner_ptr=inner, ids_ptr=ids, factors_ptr=weights, out_ptr=out, outputs=width, **_arguments(down),
        TOP_K=top_k, **_tile(down), **pdl_options(x),
    )  # fmt: skip
    return out


def _tile(matrices: ExpertMatrices) -> dict[str, int]:
    words = min(_WORDS, triton.next_power_of_2(matrices.weight.shape[2]))
    return {"TILE_OUTPUTS": _OUTPUTS, "TILE_WORDS": words, "num_warps": _WARPS}


@triton.jit
def _row_products(
    x_ptr, weight_ptr, row, mask, inputs, words, scale_ptr, zero_ptr, factor_ptr, groups, stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """Products of weight rows ``row`` with a row of inputs, ``(TILE_OUTPUTS, TILE_WORDS)``, to be summed."""
    sums = tl.zeros([TILE_OUTPUTS, TILE_WORDS], tl.float32)
    lane = tl.arange(0, TILE_WORDS)[None, :]
    for first in range(0, words, TILE_WORDS):
        w = first + lane
        known = mask[:, None] & (w < words)
        word = tl.load(weight_ptr + row[:, None] * words + w, mask=known, other=0)
        sums = add_words(
            sums, word, w, known, x_ptr, row[:, None], inputs, scale_ptr, zero_ptr, groups, stride, KIND, GROUP,
            ZEROS, TILE_OUTPUTS, TILE_WORDS,
        )  # fmt: skip
    return times_factors(sums, factor_ptr, row[:, None], mask[:, None], KIND)


@triton.jit(do_not_specialize=["groups"])
def _int4_gate_kernel(
    x_ptr, ids_ptr, out_ptr, outputs, x_stride, weight_ptr, scale_ptr, zero_ptr, factor_ptr, inputs, words,
    groups, stride, KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr, TILE_WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per pair and tile of outputs: the gate's activation times the other half of the outputs."""
    wait_for_previous(PDL)
    pair = tl.program_id(1)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    mask = output < outputs
    row = tl.load(ids_ptr + pair).to(tl.int64) * 2 * outputs + output
    x_row = x_ptr + (pair // TOP_K).to(tl.int64) * x_stride
    gate = _row_products(
        x_row, weight_ptr, row, mask, inputs, words, scale_ptr, zero_ptr, factor_ptr, groups, stride, KIND, GROUP,
        ZEROS, TILE_OUTPUTS, TILE_WORDS,
    )  # fmt: skip
    up = _row_products(
        x_row, weight_ptr, row + outputs, mask, inputs, words, scale_ptr, zero_ptr, factor_ptr, groups, stride, KIND,
        GROUP, ZEROS, TILE_OUTPUTS, TILE_WORDS,
    )  # fmt: skip
    result = activate(tl.sum(gate, axis=1), ACTIVATION) * tl.sum(up, axis=1)
    tl.store(out_ptr + pair.to(tl.int64) * outputs + output, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups"])
def _int4_down_kernel(
    inner_ptr, ids_ptr, factors_ptr, out_ptr, outputs, weight_ptr, scale_ptr, zero_ptr, factor_ptr, inputs,
    words, groups, stride, KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, TOP_K: tl.constexpr, TILE_OUTPUTS: tl.constexpr,
    TILE_WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and tile of outputs; it sums over the token's experts."""
    wait_for_previous(PDL)
    token = tl.program_id(1)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    mask = output < outputs
    sums = tl.zeros([TILE_OUTPUTS, TILE_WORDS], tl.float32)
    for index in range(TOP_K):
        pair = token * TOP_K + index
        row = tl.load(ids_ptr + pair).to(tl.int64) * outputs + output
        products = _row_products(
            inner_ptr + pair.to(tl.int64) * inputs, weight_ptr, row, mask, inputs, words, scale_ptr, zero_ptr,
            factor_ptr, groups, stride, KIND, GROUP, ZEROS, TILE_OUTPUTS, TILE_WORDS,
        )  # fmt: skip
        sums += products * tl.load(factors_ptr + pair)
    result = tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * outputs + output, result, mask=mask)


def int4_grouped_gemm_triton(x, ids, weights, gate_up: ExpertMatrices, down: ExpertMatrices, activation):
    """See :func:`engine.kernels.dispatch.experts`."""
    height = choose_height(ids.numel(), len(gate_up.weight))
    # When compiling ahead of time, compile the kernels for other numbers of tokens too.
    for rows in HEIGHTS if is_compiling() else (height,):
        gemm = partial(_grouped, rows=min(rows, 64))
        out = experts_in_groups(gemm, x, ids, weights, gate_up, down, activation)
    return out


def _grouped(x, matrices, out, order, starts, *, rows, activation=None, factors=None, top_k=1):
    """See :class:`~engine.kernels.expert_groups.GroupedGemm`. ``rows``: of a tile."""
    experts, outputs = matrices.weight.shape[:2]
    outputs = outputs if activation is None else outputs // 2
    assert out.shape == (len(order), outputs) and x.shape[1] == matrices.inputs
    arguments = _arguments(matrices)
    # Sums of small groups need registers of their own.
    small = 0 < arguments["GROUP"] <= 32 and rows > 16
    launch(
        _int4_grouped_kernel,
        (triton.cdiv(outputs, _TILE_OUTPUTS), query_tiles(len(order), experts, rows)),
        x_ptr=x, out_ptr=out, order_ptr=order, starts_ptr=starts, factors_ptr=x if factors is None else factors,
        experts=experts, outputs=outputs, x_stride=x.stride(0), **arguments, TOP_K=top_k, ROWS=rows,
        TILE_OUTPUTS=_TILE_OUTPUTS, STAGES=_STAGES, EVEN=matrices.inputs % 128 == 0, UNPACK=unpacks(x),
        ACTIVATION=activation or "", num_warps=8 if small else 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["groups"])
def _int4_grouped_kernel(
    x_ptr, out_ptr, order_ptr, starts_ptr, factors_ptr, experts, outputs, x_stride,
    weight_ptr, scale_ptr, zero_ptr, factor_ptr, inputs, words, groups, stride, KIND: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, UNPACK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per tile of outputs and tile of rows of one expert."""
    expert, begin, first, count, _ = find_tile(starts_ptr, starts_ptr, tl.program_id(1), experts, ROWS)
    if first >= count:
        return
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    row = first + tl.arange(0, ROWS)
    lane = tl.arange(0, 32)
    # Lanes beyond the last output or row load the last one again; their results are not stored.
    place = begin + tl.minimum(row, count - 1)
    pair = tl.load(order_ptr + place)
    source = place
    target = pair
    known = tl.cast(expert, tl.int64) * outputs + tl.minimum(output, outputs - 1)
    if ACTIVATION != "":
        source = pair // TOP_K
        target = place
        known = tl.cast(expert, tl.int64) * 2 * outputs + tl.minimum(output, outputs - 1)
    weights = weight_ptr + known[:, None] * words + lane[None, :]
    ups = weights + tl.cast(outputs, tl.int64) * words
    xs = x_ptr + source.to(tl.int64)[None, :] * x_stride + lane[:, None]
    acc = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([TILE_OUTPUTS, ROWS], tl.float32)
    for chunk in tl.range(0, words // 32, num_stages=STAGES):
        acc = chunk_products(
            acc, tl.load(weights + chunk * 32), xs, chunk, lane, inputs, scale_ptr, zero_ptr, known, groups, stride,
            EVEN, UNPACK, KIND, GROUP, ZEROS, TILE_OUTPUTS, ROWS,
        )  # fmt: skip
        if ACTIVATION != "":
            up = chunk_products(
                up, tl.load(ups + chunk * 32), xs, chunk, lane, inputs, scale_ptr, zero_ptr, known + outputs,
                groups, stride, EVEN, UNPACK, KIND, GROUP, ZEROS, TILE_OUTPUTS, ROWS,
            )  # fmt: skip
    acc = times_factors(acc, factor_ptr, known[:, None], (output < outputs)[:, None], KIND)
    if ACTIVATION != "":
        up = times_factors(up, factor_ptr, known[:, None] + outputs, (output < outputs)[:, None], KIND)
        acc = activate(acc, ACTIVATION) * up
    else:
        acc *= tl.load(factors_ptr + pair)[None, :]
    mask = (output < outputs)[:, None] & (row < count)[None, :]
    offset = target.to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
