"""Compiles the engine's kernels for a Hopper GPU, on a machine without one, and prints their resources.

    python -m tests.engine.kernels.hopper [--wide]

It prints one JSON object per kernel: its name, its registers per thread, and the bytes of its stack, to which
registers are spilled. Sizes are those of public models. Nothing runs: launches are noted, then compiled. Of
each kernel's variants enough are compiled to have every type of its arguments and every value of its
constants; with ``--wide`` all of them, and those of more shapes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.kernels import device, pdl
from engine.kernels.launch import compiling
from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.rotary import RotaryTable
from tests.wide import cover

TARGET = GPUTarget("cuda", 90, 32)
BF16, I32 = torch.bfloat16, torch.int32
#: Most programs along the second and the third axis of a grid. Along the first one there may be 2³¹ - 1.
MAX_GRID = 65535


class NoDevice:
    """Driver of a GPU that is not there: the compiler asks it for the target only."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def prepare() -> None:
    """Make this process choose and compile kernels as on an H100."""
    driver.set_active(NoDevice())
    pdl._supports_pdl = lambda device: True
    device._SMS_WITHOUT_GPU = 132


def tensor(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Return a tensor that nothing fills: no value is read, and to fill matrices of real sizes takes long."""
    return torch.empty(shape, dtype=dtype)


def kv_cache(kv_heads: int, dim: int, dtype: torch.dtype = BF16) -> KVCache:
    return KVCache(*tensor(2, 2, kv_heads, 16, dim, dtype=dtype))


def metadata(tokens: list[int], length: int, max_seq_len: int) -> AttentionMetadata:
    """Sequences of ``length`` tokens, of which ``tokens`` are new."""
    count = len(tokens)
    return AttentionMetadata(
        block_tables=torch.zeros(count, 128, dtype=I32),
        query_start=torch.tensor([0, *tokens]).cumsum(0).to(I32),
        seq_lens=torch.full((count,), length, dtype=I32),
        slot_mapping=torch.zeros(sum(tokens), dtype=torch.int64),
        max_query_len=max(tokens),
        max_seq_len=max_seq_len,
    )


def paged(heads: int, kv_heads: int, dim: int, tokens: list[int]) -> None:
    from engine.kernels.paged_attention import paged_attention_triton

    meta = metadata(tokens, 1000, 1000)
    paged_attention_triton(tensor(sum(tokens), heads, dim), kv_cache(kv_heads, dim), meta, scale=0.1)


def both_ways(
    heads: int, kv_heads: int, dim: int, tokens: list[int], window: int | None, gaps: bool = False
) -> None:
    """Mixed attention of a model whose images attend both ways."""
    from engine.kernels.paged_attention import paged_attention_triton

    meta = metadata(tokens, 1000, 1000)
    meta.key_ends = torch.full((sum(tokens),), 1000, dtype=I32)
    meta.gaps = gaps
    q = tensor(sum(tokens), heads, dim)
    paged_attention_triton(q, kv_cache(kv_heads, dim), meta, scale=0.1, window=window)


def prefill(heads: int, kv_heads: int, dim: int) -> None:
    from engine.kernels.prefill_attention import prefill_attention_gluon

    meta = metadata([2000], 2000, 2000)
    for paired in (False, True):
        prefill_attention_gluon(
            tensor(2000, heads, dim), kv_cache(kv_heads, dim), meta, scale=0.1, paired=paired
        )


def decode(
    heads: int,
    kv_heads: int,
    dim: int,
    sequences: int,
    *,
    section: tuple[int, ...] = (16, 24, 24),
    adjacent: bool = False,
    norms: bool = False,
    last: bool = False,
) -> None:
    from engine.kernels.decode_attention import decode_attention_triton
    from engine.kernels.rms_norm import HeadNorms

    q, k, v = tensor(sequences, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
    positions, angles = torch.zeros(len(section), sequences, dtype=torch.int64), torch.randn(64, dim // 2)
    table = RotaryTable(angles, angles, section, adjacent=adjacent)
    meta = metadata([1] * sequences, 1000, 4096)
    of_heads = HeadNorms(*tensor(2, dim), 1e-6, last=last) if norms else None
    decode_attention_triton(
        q, k, v, positions, table, kv_cache(kv_heads, dim), meta, scale=0.1, norms=of_heads
    )


def wide_heads(sequences: int) -> None:
    """Attention of a layer of Gemma 4 with full attention, and of one that borrows its keys and values."""
    from engine.kernels.decode_attention import decode_attention_triton
    from engine.kernels.kv_write import rotary_kv_write_triton
    from engine.kernels.paged_attention import paged_attention_triton
    from engine.kernels.rms_norm import HeadNorms

    dim = 512
    q, k, v = tensor(sequences, 12, dim).split([8, 2, 2], dim=1)
    positions, angles = torch.zeros(sequences, dtype=torch.int64), torch.randn(64, dim // 2)
    table, norms = RotaryTable(angles, angles), HeadNorms(*tensor(2, dim), 1e-6)
    cache, meta = kv_cache(2, dim), metadata([1] * sequences, 1000, 4096)
    for keys, values in ((k, v), (None, None)):
        rotary_kv_write_triton(q, keys, values, positions, table, cache, meta.slot_mapping, norms)
        decode_attention_triton(q, keys, values, positions, table, cache, meta, scale=1.0, norms=norms)
    paged_attention_triton(tensor(308, 8, dim), cache, metadata([300, 1, 7], 1000, 1000), scale=1.0)


def vision(heads: int, dim: int, tokens: int, images: int = 1) -> None:
    from engine.kernels.vision_attention import vision_attention_triton

    q, k, v = tensor(images * tokens, 3 * heads, dim).split(heads, dim=1)
    bounds = (torch.arange(images + 1) * tokens).to(I32)
    vision_attention_triton(q, k, v, bounds, max_len=tokens, scale=0.1)


def grid(heads: int, dim: int, side: int, window: int) -> None:
    from engine.kernels.grid_attention import grid_attention_triton

    q, k, v = tensor(side**2, 3 * heads, dim).split(heads, dim=1)
    products = tensor(side**2, heads, triton.cdiv(4 * window, 8) * 8)
    empty = tensor(heads, dim), tensor(heads, dim)
    grid_attention_triton(q, k, v, products, empty, side=side, window=window, scale=0.1)


def image(heads: int, dim: int, tokens: int, images: int = 1) -> None:
    from engine.kernels.image_attention import image_attention_gluon
    from engine.kernels.image_plan import possible_plans
    from engine.kernels.shares import part_counters

    q, k, v = tensor(images * tokens, 3 * heads, dim).split(heads, dim=1)
    bounds, counters = (torch.arange(images + 1) * tokens).to(I32), part_counters(q.device)
    for plan in possible_plans(dim, images, counted=True):
        image_attention_gluon(q, k, v, bounds, scale=0.1, plan=plan, counters=counters)


def elementwise() -> None:
    """Norms, activations, rotation, cache writes, patches."""
    from engine.kernels.act_mul import act_mul_triton
    from engine.kernels.kv_write import rotary_kv_write_triton
    from engine.kernels.layer_norm import add_layer_norm_triton
    from engine.kernels.patchify import patchify_described_triton, patchify_triton
    from engine.kernels.quick_gelu import quick_gelu_triton
    from engine.kernels.rms_norm import HeadNorms, head_norms_triton, rms_norm_triton
    from engine.kernels.rotary import rotary_triton
    from engine.kernels.sigmoid_gate import sigmoid_gate_triton

    x = tensor(4, 3584)
    rms_norm_triton(x, x[0], 1e-6)
    rms_norm_triton(x, x[0], 1e-6, x)
    heads = tensor(4, 36, 128)
    head_norms_triton(heads[:, :32], heads[:, 32:], HeadNorms(x[0, :128], x[0, :128], 1e-6))
    x = tensor(4, 1280)
    add_layer_norm_triton(x, x, x[0], x[0], 1e-6)
    quick_gelu_triton(tensor(4, 5120))
    pixels = torch.zeros(560, 560, 3, dtype=torch.uint8)
    patchify_triton(pixels, tensor(3 * 256), patch=14, merge=2, temporal=2)
    patchify_triton(pixels[None], tensor(3 * 256), patch=14, merge=1, temporal=1)
    patchify_described_triton(pixels.view(-1), tensor(3 * 256), 1664, patch=14, merge=2, temporal=2)
    act_mul_triton(tensor(4, 17920))
    sigmoid_gate_triton(tensor(4, 16, 256), tensor(4, 32, 256)[:, 1::2])
    sigmoid_gate_triton(tensor(4, 16, 128), tensor(4, 3088)[:, 3072:, None])
    angles, positions = torch.randn(64, 64), torch.zeros(3, 4, dtype=torch.int64)
    q, k, v = tensor(4, 16, 128).split([12, 2, 2], dim=1)
    table, slots = RotaryTable(angles, angles, (16, 24, 24)), torch.zeros(4, dtype=torch.int64)
    rotary_kv_write_triton(q, k, v, positions, table, kv_cache(2, 128), slots)
    rotary_kv_write_triton(q, k, v, positions, replace(table, adjacent=True), kv_cache(2, 128), slots)
    norms = HeadNorms(x[0, :128], x[0, :128], 1e-6)
    for last in (False, True):
        rotary_kv_write_triton(q, k, v, positions, table, kv_cache(2, 128), slots, replace(norms, last=last))
    q, k = tensor(4, 32, 80).split(16, dim=1)
    rotary_triton(q, k, positions[0], RotaryTable(angles[:, :40], angles[:, :40]))


def activated(rows: int, inputs: int, outputs: int, activation: str) -> None:
    from engine.kernels.gemm_activation import gemm_activation_triton

    gemm_activation_triton(tensor(rows, inputs), tensor(outputs, inputs), tensor(outputs), activation)


def gated(rows: int, inputs: int, outputs: int, activation: str, *, bias: bool = False) -> None:
    from engine.kernels.wide_gemm import wide_gemm_gluon

    given = tensor(2 * outputs) if bias else None
    wide_gemm_gluon(tensor(rows, inputs), tensor(2 * outputs, inputs), given, activation)


def decode_step() -> None:
    """Sampling, state and linear layers of a decode step."""
    from engine.kernels.decode_state import advance_triton, gather_decode_inputs_triton, write_changes_triton
    from engine.kernels.gemv import gemv_triton
    from engine.kernels.gumbel import argmax_triton, gumbel_argmax_triton
    from engine.kernels.norm_gemv import norm_gemv_triton
    from engine.kernels.rms_norm import Addend, rms_norm_triton
    from engine.kernels.skinny_gemm import skinny_gemm_triton, split_counters
    from engine.kernels.split_sums import Pair
    from engine.kernels.step_inputs import StepInputs, StepLayout, StepState, gather_step_inputs_triton
    from engine.kernels.truncation import truncation_threshold_triton

    logits, ones = tensor(4, 151936), torch.ones(4)
    ids = torch.ones(4, dtype=torch.int64)
    truncation_threshold_triton(logits, ones, ids, ones, ones)
    gumbel_argmax_triton(logits, ones, ids, ids, ones)
    argmax_triton(logits)
    allowed = torch.zeros(4, 4748, dtype=I32)
    gumbel_argmax_triton(logits, ones, ids, ids, None, allowed)
    argmax_triton(logits, allowed)
    tables = torch.zeros(2, 9, 256, dtype=I32)
    gather_decode_inputs_triton(ids, tables, ids, ids, ids, block_size=16)
    advance_triton(ids, ids, ids, ids, padding_slot=3)
    write_changes_triton(ids, tables, ids)
    for groups, axes, both_ways in ((1, 3, False), (2, 1, True)):
        tables = torch.zeros(groups, 9, 256, dtype=I32)
        layout = StepLayout(8, groups, axes, both_ways)
        state = StepState(tables, ids, ids, ids, block_size=16, padding_slot=8)
        room = StepInputs.zeros(layout, 64, 8, 8, 256, torch.device("cpu"))
        gather_step_inputs_triton(torch.zeros(layout.size(64), dtype=torch.int64), layout, state, room)
    x, norm = tensor(1, 1536), tensor(1536)
    gemv_triton(tensor(1, 8960), tensor(1536, 8960))
    norm_gemv_triton(x, x, norm, 1e-6, tensor(2048, 1536), tensor(2048))
    norm_gemv_triton(x, x, norm, 1e-6, tensor(17920, 1536), activation="silu")
    x, norm = tensor(1, 3584), tensor(3584)
    gemv_triton(x, tensor(3584, 3584))
    norm_gemv_triton(x, x, norm, 1e-6, tensor(37888, 3584), activation="silu")
    # EXAONE 4.5, Gemma 3, Aya Vision.
    for inputs, inner, kind in ((5120, 27392, "alone"), (2560, 10240, "both"), (4096, 14336, "pair")):
        x, norm = tensor(1, inputs), tensor(inputs)
        given = Pair(x, x) if kind == "pair" else Addend(x, norm, 1e-6, 1.0 if kind == "both" else None)
        scale = None if kind == "alone" else norm
        for outputs, activation in ((6144, None), (2 * inner, "silu")):
            weight = tensor(outputs, inputs)
            options = {"activation": activation, "centred": kind == "pair"}
            norm_gemv_triton(given, x, scale, 1e-6, weight, **options)
    counters = split_counters(1536, torch.device("cpu"))
    for rows in (16, 64):
        skinny_gemm_triton(tensor(rows, 1536), tensor(17920, 1536), activation="silu")
        skinny_gemm_triton(tensor(rows, 1536), tensor(2048, 1536), tensor(2048))
        skinny_gemm_triton(tensor(rows, 8960), tensor(1536, 8960), counters=counters)
        sums = skinny_gemm_triton(tensor(rows, 8960), tensor(1536, 8960), parts=True)
        rms_norm_triton(sums, tensor(1536), 1e-6, tensor(rows, 1536))


def fp8_weights() -> None:
    """Linear layers with fp8 weights: one scale an output, and one for each 128 inputs."""
    from engine.kernels.act_mul import act_rounded_triton
    from engine.kernels.even_gemm import choose_tile, even_gemm_gluon
    from engine.kernels.fp8 import FP8, RoundedRows, Scale, dequantise_triton, quantise_rows_triton
    from engine.kernels.fp8_mma import fp8_mma_gluon
    from engine.kernels.gemv import gemv_triton
    from engine.kernels.layer_norm import layer_norm_rounded_triton
    from engine.kernels.norm_gemv import norm_gemv_triton
    from engine.kernels.rms_norm import rms_norm_triton
    from engine.kernels.skinny_gemm import skinny_gemm_triton, split_counters
    from engine.kernels.wide_gemm import wide_gemm_gluon

    def weight(outputs: int, inputs: int, group: int) -> dict[str, Any]:
        values = torch.ones(outputs, -(-inputs // group))
        return {"weight": tensor(outputs, inputs, dtype=FP8), "scale": Scale(values, group)}

    x, norm = tensor(1, 3584), tensor(3584)
    counters = split_counters(3584, torch.device("cpu"))
    for group in (1 << 15, 128):
        gemv_triton(tensor(1, 18944), **weight(3584, 18944, group))
        norm_gemv_triton(x, x, norm, 1e-6, **weight(37888, 3584, group), activation="silu")
        skinny_gemm_triton(tensor(16, 18944), **weight(3584, 18944, group), counters=counters)
    skinny_gemm_triton(tensor(64, 3584), **weight(37888, 3584, 128), activation="silu")
    for rows in (1, 16, 64):
        rounded = {"row_scale": torch.ones(rows, 1), "dtype": BF16}
        gated, plain = weight(37888, 3584, 1 << 15), weight(3584, 18944, 1 << 15)
        run, split = (fp8_mma_gluon, {}) if rows == 1 else (skinny_gemm_triton, {"counters": counters})
        run(tensor(rows, 3584, dtype=FP8), **gated, **rounded, activation="silu")
        run(tensor(rows, 18944, dtype=FP8), **plain, **rounded, **split)
        if rows == 1:
            # Rows that the kernel rounds.
            for inputs in (3584, 4096):
                run(tensor(1, inputs), **weight(3584, inputs, 1 << 15), dtype=BF16)
        if rows > 1:
            sums = skinny_gemm_triton(tensor(rows, 18944, dtype=FP8), **plain, **rounded, parts=True)
            rms_norm_triton(sums, norm, 1e-6, tensor(rows, 3584), rounded=True)
    dequantise_triton(**weight(4608, 3584, 128), dtype=BF16)
    gated = weight(37888, 3584, 1 << 15)
    for rows in (512, 4096):
        rounded = {"row_scale": torch.ones(rows, 1), "dtype": BF16}
        wide_gemm_gluon(tensor(rows, 3584, dtype=FP8), **gated, **rounded, bias=None, activation="silu")
    sizes = (512, 3584, 4608, tensor(4608)), (512, 1536, 1536, None), (512, 8960, 1536, None)
    for rows, inputs, outputs, bias in sizes:
        plain, rounded = (
            weight(outputs, inputs, 1 << 15),
            RoundedRows.empty(rows, inputs, torch.device("cpu")),
        )
        tile = choose_tile(rows, outputs, 132)
        assert tile is not None
        even_gemm_gluon(rounded, **plain, bias=bias, dtype=BF16, tile=tile)
    for rows in (1, 100):
        quantise_rows_triton(tensor(rows, 18944))
        quantise_rows_triton(tensor(rows, 18944), 128)
        rms_norm_triton(tensor(rows, 3584), norm, 1e-6, tensor(rows, 3584), rounded=True)
        act_rounded_triton(tensor(rows, 37888), "silu", gated=True)
        act_rounded_triton(tensor(rows, 5120), "quick_gelu", gated=False)
        layer_norm_rounded_triton(tensor(rows, 1280), tensor(rows, 1280), norm[:1280], norm[:1280], 1e-6)


def before_norm() -> None:
    """GEMMs of a few rows before a norm, in bf16 and fp8."""
    from engine.kernels.fp8 import FP8, Scale
    from engine.kernels.ring_gemm import ring_gemm_gluon, tile_gemm_gluon

    for rows in (16, 64):
        ring_gemm_gluon(tensor(rows, 8960), tensor(1536, 8960))
        ring_gemm_gluon(tensor(rows, 8960), tensor(1536, 8960), tensor(1536))
        scales = {"scale": Scale(torch.ones(3584, 1), 1 << 15), "row_scale": torch.ones(rows, 1)}
        ring_gemm_gluon(tensor(rows, 18944, dtype=FP8), tensor(3584, 18944, dtype=FP8), **scales, dtype=BF16)
    scales = {"scale": Scale(torch.ones(4608, 1), 1 << 15), "row_scale": torch.ones(64, 1)}
    weight = tensor(4608, 3584, dtype=FP8)
    for bias in (None, tensor(4608)):
        tile_gemm_gluon(tensor(64, 3584, dtype=FP8), weight, bias, **scales, dtype=BF16)
    scales = {"scale": Scale(torch.ones(3584, 1), 1 << 15), "row_scale": torch.ones(256, 1)}
    ring_gemm_gluon(tensor(256, 18944, dtype=FP8), tensor(3584, 18944, dtype=FP8), **scales, dtype=BF16)


def output_shares() -> None:
    """GEMMs of 17 to 64 rows by programs of 128 outputs or more, gated or not."""
    from engine.kernels.ring_shares import ring_shares_gluon

    for outputs, inputs in ((11008, 4096), (14336, 4096), (18944, 3584)):
        ring_shares_gluon(tensor(64, inputs), tensor(2 * outputs, inputs), "silu")
    ring_shares_gluon(tensor(64, 4096), tensor(12288, 4096))


def int4_weights() -> None:
    """int4 weights: groups of 128 with zero points (AWQ), symmetric groups of 32, one group."""
    from engine.kernels.int4 import Int4Scale, dequantise_int4_triton
    from engine.kernels.int4_gemm import int4_gemm_triton
    from engine.kernels.int4_gemv import int4_gemv_triton
    from engine.kernels.int4_mma import int4_mma_gluon
    from engine.kernels.int4_mma_ring import int4_mma_ring_gluon
    from engine.kernels.int4_wgmma import int4_wgmma_gluon
    from engine.kernels.skinny_gemm import split_counters

    def weight(outputs: int, inputs: int, group: int, zeros: bool) -> dict[str, Any]:
        values = torch.ones(outputs, -(-inputs // group), dtype=torch.float16)
        points = values.to(torch.uint8) if zeros else None
        words = torch.zeros(outputs, inputs // 4, dtype=torch.int16)
        return {"words": words, "scale": Int4Scale(inputs, values, group, points).paired()}

    counters = split_counters(3584, torch.device("cpu"))
    for group, zeros in ((128, True), (32, False)):
        int4_gemv_triton(tensor(1, 3584), **weight(37888, 3584, group, zeros))
        int4_mma_gluon(tensor(16, 3584), **weight(37888, 3584, group, zeros))
    int4_gemv_triton(tensor(1, 18944), **weight(3584, 18944, 1 << 15, True))
    int4_mma_gluon(tensor(1, 18944), **weight(3584, 18944, 1 << 15, True))
    for rows in (1, 4, 8):
        int4_mma_ring_gluon(tensor(rows, 3584), **weight(37888, 3584, 128, True))
    int4_mma_ring_gluon(tensor(1, 18944), **weight(3584, 18944, 1 << 15, True))
    for rows in (8, 16, 64, 128):
        int4_wgmma_gluon(tensor(rows, 18944), **weight(3584, 18944, 128, True), counters=counters)
    int4_gemm_triton(tensor(64, 3584), **weight(37888, 3584, 128, True))
    int4_gemm_triton(tensor(16, 18944), **weight(3584, 18944, 128, True), counters=counters)
    dequantise_int4_triton(**weight(4608, 3584, 128, True), dtype=BF16)


def float_weights(kind: str, group: int) -> None:
    """Weights in floats of 4 bits."""
    from engine.kernels.int4 import dequantise_int4_triton
    from engine.kernels.int4_gemm import int4_gemm_triton
    from engine.kernels.int4_gemv import int4_gemv_triton
    from engine.kernels.int4_mma import int4_mma_gluon

    given = float_weight(3584, 18944, kind, group)
    int4_gemv_triton(tensor(1, 18944), *given)
    int4_mma_gluon(tensor(1, 18944), *given)
    int4_gemm_triton(tensor(64, 18944), *given)
    dequantise_int4_triton(*given, dtype=BF16)


def float_weight(outputs: int, inputs: int, kind: Any, group: int) -> tuple[torch.Tensor, Any]:
    """Words and scales of a weight in floats of 4 bits."""
    from engine.kernels.int4 import Int4Scale

    values = torch.ones(outputs, -(-inputs // group), dtype=torch.uint8)
    factors = torch.ones(outputs) if kind == "nvfp4" else None
    words = torch.zeros(outputs, inputs // 4, dtype=torch.int16)
    return words, Int4Scale(inputs, values, group, kind=kind, factors=factors)


def fp8_cache(sequences: int) -> None:
    """Write and prefill with keys and values in fp8, and decode ``sequences``."""
    from engine.kernels.decode_attention import decode_attention_triton
    from engine.kernels.fp8 import FP8
    from engine.kernels.fp8_attention import decode_attention_gluon, single_attention_gluon
    from engine.kernels.kv_write import rotary_kv_write_triton
    from engine.kernels.paged_attention import paged_attention_triton

    cache, angles = kv_cache(4, 128, FP8), torch.randn(64, 64)
    table = RotaryTable(angles, angles, (16, 24, 24))
    q, k, v = tensor(64, 36, 128).split([28, 4, 4], dim=1)
    positions, slots = torch.zeros(3, 64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    rotary_kv_write_triton(q, k, v, positions, table, cache, slots)
    new = slice(sequences)
    meta = metadata([1] * sequences, 1000, 4096)
    for decode_attention in (decode_attention_gluon, decode_attention_triton):
        decode_attention(q[new], k[new], v[new], positions[:, new], table, cache, meta, scale=0.1)
    mixed = metadata([60, 1, 1, 1, 1], 1000, 1000)
    with compiling():
        # With any number of warps, keys split or not.
        single_attention_gluon(q, cache, mixed, scale=0.1)
    paged_attention_triton(q, cache, mixed, scale=0.1, singles=False)


def delta_net(tokens: list[int]) -> None:
    """A gated delta net of Qwen3.5-4B: a decode step, or prompt chunks."""
    from engine.kernels.causal_conv import conv_triton
    from engine.kernels.delta_prefill import delta_prefill_triton
    from engine.kernels.delta_rule import DeltaGates, delta_step_triton
    from engine.kernels.gated_norm import gated_norm_triton
    from engine.kernels.recurrent_state import StateCache

    meta, count = metadata(tokens, 1000, 1000), sum(tokens)
    meta.state_rows = torch.zeros(len(tokens), dtype=torch.int64)
    cache = StateCache(tensor(2, 3, 8192), torch.zeros(2, 32, 128, 128))
    qkv = conv_triton(tensor(count, 8192), tensor(8192, 4), None, cache, meta, gated=False)
    both, weights = tensor(count, 64), torch.zeros(2, 32)
    gates = DeltaGates(both[:, :32], both[:, 32:], weights[0], weights[1])
    out = (delta_step_triton if max(tokens) == 1 else delta_prefill_triton)(qkv, gates, cache, meta)
    gated_norm_triton(out, tensor(count, 4096), tensor(128), 1e-6)


def delta_scan() -> None:
    """The Gluon scan of a prompt of several segments."""
    from engine.kernels.delta_rule import CHUNK
    from engine.kernels.delta_scan import scan_gluon
    from engine.kernels.delta_tiles import DeltaTiles
    from engine.kernels.recurrent_state import StateCache

    meta = metadata([4000], 4000, 4000)
    meta.state_rows = torch.zeros(1, dtype=torch.int64)
    cache = StateCache(tensor(2, 3, 8192), torch.zeros(2, 32, 128, 128))
    shapes = [(CHUNK, 128), (CHUNK, 128), (CHUNK, 128), (128, CHUNK), (CHUNK, CHUNK)]
    tiles = DeltaTiles(*(tensor(2, 32, *shape) for shape in shapes), torch.zeros(2, 32, 2, CHUNK))
    states = torch.zeros(2, 32, 128, 128)
    scan_gluon(tiles, None, states, cache, meta, 4000, 2048, states)
    scan_gluon(tiles, tensor(4000, 32, 128), states, cache, meta, 4000, 2048)


def short_conv(tokens: list[int], *, bias: bool) -> None:
    """A short convolution of LFM2-1.2B: a decode step, or prompt chunks."""
    from engine.kernels.causal_conv import conv_triton
    from engine.kernels.recurrent_state import StateCache

    meta, count = metadata(tokens, 1000, 1000), sum(tokens)
    meta.state_rows = torch.zeros(len(tokens), dtype=torch.int64)
    cache = StateCache(tensor(2, 2, 2048), torch.zeros(2, 0, 0, 0))
    added = tensor(2048) if bias else None
    conv_triton(tensor(count, 3 * 2048), tensor(2048, 3), added, cache, meta, gated=True)


def routers() -> None:
    """Routers of Qwen3-VL-30B-A3B and of DeepSeek-V3."""
    from engine.kernels.norm_router import norm_router_triton
    from engine.kernels.route import Routing, route_triton
    from engine.kernels.router_config import RouterConfig
    from engine.kernels.router_logits import router_logits_triton

    logits = torch.zeros(4, 256)
    x = tensor(1, 2048)
    weight = tensor(128, 2048, dtype=torch.float32)
    norm_router_triton(x, x, x[0], 1e-6, weight, 1.0)
    router_logits_triton(tensor(4096, 2048), weight)
    route_triton(Routing(logits[:, :128].contiguous(), RouterConfig(128, 8)))
    groups = {"num_groups": 8, "top_groups": 4, "correction_bias": True}
    route_triton(Routing(logits, RouterConfig(256, 8, "sigmoid", **groups), logits[0]))


def experts(tokens: int, group: int | None = None, *, persistent: bool = False) -> None:
    """Experts of Qwen3-VL-30B-A3B, in bf16, or in fp8 with a scale for each ``group`` inputs."""
    from engine.kernels.expert_gemm import grouped_experts_gluon
    from engine.kernels.expert_gemv import expert_gemv_triton
    from engine.kernels.experts import ExpertMatrices
    from engine.kernels.fp8 import FP8, Scale
    from engine.kernels.grouped_gemm import grouped_experts_triton
    from engine.kernels.route import Routing
    from engine.kernels.router_config import RouterConfig

    def matrices(outputs: int, inputs: int) -> ExpertMatrices:
        if group is None:
            return ExpertMatrices(tensor(8, outputs, inputs))
        scale = Scale(torch.ones(8 * outputs, -(-inputs // group)), group, True, outputs=128)
        return ExpertMatrices(tensor(8, outputs, inputs, dtype=FP8), scale)

    x, stored = tensor(tokens, 2048), (matrices(1536, 2048), matrices(2048, 768))
    if tokens == 1:
        routing = Routing(torch.zeros(1, 128), RouterConfig(128, 8))
        expert_gemv_triton(x, routing, *stored, "silu")
    else:
        run = grouped_experts_gluon if persistent else grouped_experts_triton
        run(x, torch.zeros(tokens, 2, dtype=I32), torch.ones(tokens, 2), *stored, "silu")


def int4_experts(tokens: int, kind: str) -> None:
    """Experts of Qwen3.5-35B-A3B in int4, or in floats of 4 bits."""
    from engine.kernels.experts import ExpertMatrices
    from engine.kernels.int4 import Int4Scale
    from engine.kernels.int4_experts import int4_expert_gemv_triton, int4_grouped_gemm_triton

    def matrices(outputs: int, inputs: int) -> ExpertMatrices:
        if kind == "int4":
            values = torch.ones(8 * outputs, inputs // 128, dtype=torch.float16)
            scale = Int4Scale(inputs, values, 128, values.to(torch.uint8))
            return ExpertMatrices(torch.zeros(8, outputs, inputs // 4, dtype=torch.int16), scale)
        words, scale = float_weight(8 * outputs, inputs, kind, 16)
        return ExpertMatrices(words.unflatten(0, (8, -1)), scale)

    ids, weights = torch.zeros(tokens, 2, dtype=I32), torch.ones(tokens, 2)
    run = int4_expert_gemv_triton if tokens == 1 else int4_grouped_gemm_triton
    run(tensor(tokens, 2048), ids, weights, matrices(1024, 2048), matrices(2048, 512), "silu")


def several_ranks(rows: int, ranks: int) -> None:
    """Look up a split table, and sum over ranks by peer memory."""
    from engine.kernels.gemv import gemv_sum_triton
    from engine.kernels.peer_reduce import PROGRAMS, PeerBuffers, peer_all_gather, peer_all_reduce
    from engine.kernels.shard_rows import shard_rows_triton

    addresses = tuple(1 << 40 | rank << 25 for rank in range(ranks))
    shard_rows_triton(tensor(64, 3584), torch.zeros(rows, dtype=torch.int64), 0, 64)
    halves, ended = tensor(PROGRAMS + 1, dtype=I32), tensor(1, dtype=I32)
    peers = PeerBuffers(0, ranks, addresses, halves, ended)
    peer_all_reduce(tensor(rows, 3584), peers)
    if rows == 1:
        gemv_sum_triton(tensor(1, 4736), tensor(3584, 4736), None, peers)
        peer_all_gather(tensor(rows, 152064 // ranks), peers)


#: Cases that together have every kernel, with each kind of matrices it takes, and its largest tiles.
CASES: list[Callable[[], None]] = [
    elementwise,
    decode_step,
    partial(delta_net, [1] * 4),
    partial(delta_net, [2100, 1, 7]),
    delta_scan,
    partial(short_conv, [1] * 4, bias=True),
    partial(short_conv, [300, 1, 7], bias=True),
    fp8_weights,
    before_norm,
    output_shares,
    int4_weights,
    # Of the two kinds of floats this one takes more registers.
    partial(float_weights, "nvfp4", 16),
    partial(fp8_cache, 64),
    routers,
    # Few tokens, and tiles of several heights.
    *(partial(experts, tokens) for tokens in (1, 256, 4096)),
    *(partial(experts, tokens, 128) for tokens in (1, 4096)),
    partial(experts, 64, persistent=True),
    *(partial(experts, tokens, group, persistent=True) for tokens in (64, 4096) for group in (1 << 15, 128)),
    *(partial(int4_experts, tokens, "int4") for tokens in (1, 256)),
    partial(int4_experts, 64, "nvfp4"),
    lambda: decode(32, 2, 128, 1, adjacent=True),
    lambda: decode(32, 4, 128, 1, norms=True),
    lambda: decode(12, 2, 128, 64),
    # HunyuanOCR's four axes.
    lambda: decode(16, 8, 128, 1, section=(16, 16, 16, 16), norms=True, last=True),
    lambda: paged(28, 4, 128, [300, 1, 7]),
    lambda: both_ways(8, 4, 256, [300, 1, 7], 1024),
    partial(wide_heads, 1),
    lambda: prefill(28, 4, 128),
    lambda: vision(16, 80, 1600),
    lambda: image(16, 80, 1600),
    # SAM's blocks over whole images, and over windows that don't divide them.
    lambda: grid(12, 64, 64, 64),
    lambda: grid(12, 64, 64, 14),
    *(partial(gated, rows, 1536, 8960, "silu") for rows in (512, 4096)),
    partial(activated, 4096, 1280, 5120, "gelu_pytorch_tanh"),
    partial(several_ranks, 1, 4),
    partial(several_ranks, 512, 4),
]
#: More shapes and options of the same kernels.
MORE_CASES: list[Callable[[], None]] = [
    partial(short_conv, [1] * 4, bias=False),
    partial(short_conv, [300, 1, 7], bias=False),
    partial(float_weights, "mxfp4", 32),
    partial(fp8_cache, 1),
    partial(experts, 64),
    partial(int4_experts, 64, "int4"),
    *(partial(int4_experts, tokens, "nvfp4") for tokens in (1, 256)),
    # One program per SM, a few per SM, and many, which get smaller tiles and no split.
    lambda: decode(12, 2, 128, 1),
    lambda: decode(32, 32, 128, 1),
    lambda: decode(28, 4, 128, 1),
    lambda: decode(32, 4, 128, 256, norms=True),
    lambda: decode(12, 2, 128, 256),
    lambda: decode(32, 32, 128, 64),
    lambda: paged(32, 32, 128, [300, 1, 7]),
    lambda: both_ways(8, 4, 256, [300, 1, 7], None),
    # Molmo 2, whose images see each other, but not the text between them.
    lambda: both_ways(32, 8, 128, [300, 1, 7], None, gaps=True),
    partial(wide_heads, 256),
    lambda: prefill(14, 2, 64),
    lambda: vision(16, 80, 1600, images=4),
    lambda: vision(16, 64, 577),
    lambda: vision(16, 72, 1024),
    *(partial(several_ranks, rows, 8) for rows in (1, 512)),
    lambda: image(16, 64, 1600),
    lambda: grid(12, 64, 48, 48),
    lambda: grid(12, 64, 48, 14),
    lambda: grid(16, 80, 64, 64),
    lambda: image(16, 128, 1600),
    partial(gated, 512, 1536, 8960, "gelu_pytorch_tanh", bias=True),
    *(partial(activated, 4096, 1280, 5120, activation) for activation in ("silu", "gelu", "quick_gelu")),
]


def resources(binary: bytes) -> dict[str, int]:
    """Read registers per thread and bytes of stack from a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        output = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", output)
    assert usage is not None, output
    return {"registers": int(usage[1]), "stack": int(usage[2])}


class Noted:
    """Stands in for a kernel that is not compiled."""

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class Variant:
    """A kernel with types and constants, as Triton's ``JITFunction._do_compile`` takes them."""

    kernel: JITFunction
    key: str
    signature: dict[str, str]
    device: int
    constants: dict[tuple[int, ...], Any]
    options: Any
    attributes: Any

    def compile(self) -> Any:
        """Return the compiled kernel."""
        arguments = self.signature, self.device, self.constants, self.options, self.attributes
        return self.kernel._do_compile(self.key, *arguments, warmup=True)

    def row(self) -> dict[str, str]:
        """What tells variants apart: types, without tiles of TMA descriptors, constants, warps."""
        types = {name: str(type_).split("[")[0] for name, type_ in self.signature.items()}
        names = [param.name for param in self.kernel.params]
        values = {f"{names[path[0]]}{path[1:]}": repr(value) for path, value in self.constants.items()}
        return {**types, **values, "warps": str(self.options.num_warps)}


def launched(cases: Sequence[Callable[[], None]]) -> list[Variant]:
    """Run ``cases`` without compiling anything, and return the variants that they launch, each once."""
    found: list[Variant] = []

    def note(self: JITFunction, key: str, signature: Any, device: int, *rest: Any) -> Noted:
        found.append(Variant(self, key, signature, device, *rest[:-1]))
        return self.device_caches[device][0].setdefault(key, Noted())

    run, compile_ = JITFunction.run, JITFunction._do_compile

    def check(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        assert max(grid[1:], default=0) <= MAX_GRID, f"{self.__name__}: no GPU launches the grid {grid}"
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction._do_compile = note
    JITFunction.run = check
    try:
        for case in cases:
            case()
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_
    return found


def covering(variants: Sequence[Variant], strength: int = 1) -> list[Variant]:
    """The variants that together have, for each kernel, each combination of ``strength`` types and values."""
    by_kernel: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        by_kernel[variant.kernel.__name__].append(variant)
    return [
        each[number]
        for each in by_kernel.values()
        for number in sorted(cover([variant.row() for variant in each], strength))
    ]


def compile_all(variants: Sequence[Variant]) -> None:
    """Compile ``variants`` and print a row for each."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for variant, kernel in zip(variants, pool.map(Variant.compile, variants), strict=True):
            usage = resources(kernel.asm["cubin"])
            print(json.dumps({"kernel": variant.kernel.__name__, **usage}), flush=True)


def main() -> None:
    prepare()
    wide = "--wide" in sys.argv
    variants = launched([*CASES, *(MORE_CASES if wide else ())])
    compile_all(variants if wide else covering(variants))


if __name__ == "__main__":
    sys.exit(main())
