"""Compiles for a Hopper GPU, on a machine without one, what the choice among kernels lets through.

    python -m tests.engine.kernels.admitted [--wide]

The operations of :mod:`engine.kernels.dispatch`, norms and convolutions are called with all combinations of
the dtypes of models, the formats of matrices and caches, and options, and with numbers of rows on both
sides of each limit. Of what they launch each type and each value of a kernel goes through the compiler's
front end, which finds types that don't fit. It prints a row for each. With ``--wide`` these are compiled to
their end, as in :mod:`tests.engine.kernels.hopper`, and each pair of types and values goes through the front
end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.nn import functional
from triton.compiler.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from engine.kernels import device, dispatch, gemm_activation
from engine.kernels.activation import ACTIVATIONS
from engine.kernels.causal_conv import conv_triton
from engine.kernels.delta_rule import DeltaGates
from engine.kernels.experts import ExpertMatrices
from engine.kernels.fp8 import FP8, Scale
from engine.kernels.gated_norm import gated_norm_triton
from engine.kernels.int4 import Int4Scale
from engine.kernels.layer_norm import add_layer_norm_triton
from engine.kernels.peer_reduce import PROGRAMS, PeerBuffers
from engine.kernels.recurrent_state import StateCache
from engine.kernels.rms_norm import Addend, HeadNorms, head_norms, rms_norm
from engine.kernels.rotary import RotaryTable
from engine.kernels.route import Routing
from engine.kernels.router_config import RouterConfig
from engine.kernels.shares import part_counters
from engine.kernels.skinny_gemm import split_counters
from engine.kernels.split_sums import Pair
from engine.weights.formats import INT4_SCALES
from tests.engine.kernels.hopper import (
    MAX_GRID,
    Variant,
    compile_all,
    covering,
    kv_cache,
    launched,
    metadata,
    prepare,
    tensor,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU = torch.device("cpu")
#: On both sides of the limits of kernels.
ROWS = (1, 2, 3, 9, 17, 64, 65, 129, 257)
#: Inputs of a matrix: whole chunks and rows of whole 16 bytes, few and many, or neither.
INPUTS = (512, 516, 16384)
OUTPUTS = 1024

Matrix = tuple[torch.Tensor, Scale | Int4Scale | None]


def fp8_matrices(outputs: int, inputs: int, same: int = 1) -> Iterator[Matrix]:
    """Matrices in fp8 with one scale an output and with several.

    Args:
        same: consecutive outputs with equal scales.
    """
    for group, rounds in product((1 << 15, 128), (False, True)):
        values = torch.ones(outputs, -(-inputs // group))
        yield tensor(outputs, inputs, dtype=FP8), Scale(values, group, rounds, outputs=same)


def packed_matrices(outputs: int, inputs: int) -> Iterator[Matrix]:
    """Matrices in 4 bits."""
    words = tensor(outputs, -(-inputs // 128) * 32, dtype=torch.int16)
    for dtype, group, zeros in product(INT4_SCALES.values(), (16, 32, 64, 128, 256, inputs), (False, True)):
        values = tensor(outputs, -(-inputs // group), dtype=dtype)
        yield words, Int4Scale(inputs, values, group, values.to(torch.uint8) if zeros else None).paired()
    for kind, group in (("mxfp4", 32), ("nvfp4", 16)):
        values = tensor(outputs, -(-inputs // group), dtype=torch.uint8)
        factors = torch.ones(outputs) if kind == "nvfp4" else None
        yield words, Int4Scale(inputs, values, group, kind=kind, factors=factors)


def many(dtype: torch.dtype) -> None:
    """More outputs, rows or tokens than programs along the second axis of a grid."""
    count, size = MAX_GRID + 1, 256
    x, weight = tensor(300, size, dtype=dtype), tensor(count, size, dtype=dtype)
    for matrix, scale in [(weight, None), *fp8_matrices(count, size), *packed_matrices(count, size)]:
        for rows in (1, 64, 300):
            dispatch.linear(x[:rows], matrix, scale=scale)
    rms_norm(weight, weight[0], 1e-6, weight)
    heads = tensor(count, 4, 64, dtype=dtype)
    head_norms(heads[:, :2], heads[:, 2:], HeadNorms(weight[0, :64], weight[0, :64], 1e-6))
    gated_norm_triton(heads, heads.flatten(1), weight[0, :64], 1e-6)
    meta = metadata([count], count, count)
    meta.state_rows = torch.zeros(1, dtype=torch.int64)
    dispatch.paged_attention(heads, kv_cache(2, 64, dtype), meta, scale=0.1)
    cache = StateCache(tensor(2, 3, 256, dtype=dtype), torch.zeros(2, 2, 64, 64))
    gates = DeltaGates(*tensor(2, count, 2, dtype=dtype), *torch.zeros(2, 2))
    conv_triton(tensor(count, 256, dtype=dtype), tensor(256, 4, dtype=dtype), None, cache, meta, gated=False)
    dispatch.delta_rule(tensor(count, 256, dtype=dtype), gates, cache, meta)
    gate_up, down = (ExpertMatrices(tensor(8, size, size // part, dtype=dtype)) for part in (1, 2))
    routing = Routing(torch.zeros(count, 8), RouterConfig(8, 2))
    dispatch.experts(weight, routing, gate_up, down, "silu")


def linears(dtype: torch.dtype, inputs: int) -> None:
    """Linear layers, with norms before them and without."""
    matrices = [(tensor(OUTPUTS, inputs, dtype=dtype), None), *fp8_matrices(OUTPUTS, inputs)]
    norm = tensor(inputs, dtype=dtype)
    buffers = tensor(PROGRAMS + 1, dtype=torch.int32), tensor(1, dtype=torch.int32)
    peers = PeerBuffers(0, 2, (1 << 40, 1 << 41), *buffers)
    for (weight, scale), rows, biased in product(
        [*matrices, *packed_matrices(OUTPUTS, inputs)], ROWS, (False, True)
    ):
        x, bias = tensor(rows, inputs, dtype=dtype), tensor(OUTPUTS, dtype=dtype) if biased else None
        counters = None if biased else split_counters(OUTPUTS, CPU)
        dispatch.linear(x, weight, bias, counters=counters, scale=scale)
        if isinstance(scale, Int4Scale):
            continue
        dispatch.sum_linear(x, weight, peers, scale=scale)
        sums = dispatch.split_linear(x, weight, bias, scale=scale)
        scales, added = tensor(2, OUTPUTS, dtype=dtype), tensor(rows, OUTPUTS, dtype=dtype)
        rms_norm(sums, scales[0], 1e-6, added)
        for after in (None, scales[1]):
            rms_norm(Addend(sums, scales[0], 1e-6), after, 1e-6, added)
        rms_norm(Addend(sums, None, 0.0, multiplier=0.5), None, 0.0, added, factor=scales[0, :1])
        add_layer_norm_triton(Pair(sums, sums), added, scales[0], None, 1e-6)
        for activation in ACTIVATIONS:
            dispatch.linear(x, weight, bias, activation=activation, counters=counters, scale=scale)
        for residual, offset, activation in product((None, x), (None, 1.0), (None, "silu")):
            options = {"offset": offset, "scale": scale, "activation": activation}
            dispatch.norm_linear(x, residual, norm, 1e-6, weight, bias, **options)
            layer = weight, bias
            if residual is not None:
                given = Addend(x, norm, 1e-6, offset, 1.0 if activation else 0.5)
                dispatch.norm_linear(given, residual, norm, 1e-6, *layer, **options)
                dispatch.norm_linear(given, residual, None, 0.0, *layer, activation=activation, scale=scale)
            given = x if residual is None else Pair(x, x)
            options["offset"] = None
            dispatch.norm_linear(given, residual, norm, 1e-6, *layer, centred=True, **options)
            options["offset"] = offset
            if activation is not None and dtype == torch.bfloat16:
                dispatch.norm_gated_rounded(x, residual, norm, 1e-6, weight, bias, **options)


def gates(dtype: torch.dtype) -> None:
    """Gated layers of Qwen2-VL-7B."""
    weight = tensor(2 * 18944, 3584, dtype=dtype)
    for activation, rows in product(ACTIVATIONS, ROWS):
        dispatch.linear(tensor(rows, 3584, dtype=dtype), weight, activation=activation)


def activated(dtype: torch.dtype) -> None:
    """MLPs of towers."""
    for activation, biased, rows in product(ACTIVATIONS, (False, True), (1, 4096)):
        bias = tensor(1024, dtype=dtype) if biased else None
        dispatch.activated_linear(
            tensor(rows, 64, dtype=dtype), tensor(1024, 64, dtype=dtype), bias, activation
        )


def mixtures(dtype: torch.dtype) -> None:
    """Experts in each format."""
    count, width, inner = 8, 512, 256

    def matrices(outputs: int, inputs: int) -> Iterator[ExpertMatrices]:
        found = [*fp8_matrices(count * outputs, inputs, 128), *packed_matrices(count * outputs, inputs)]
        for weight, scale in [(tensor(count * outputs, inputs, dtype=dtype), None), *found]:
            yield ExpertMatrices(weight.unflatten(0, (count, outputs)), scale)

    config = RouterConfig(count, 2)
    pairs = list(zip(matrices(2 * inner, width), matrices(width, inner), strict=True))
    for (gate_up, down), tokens in product(pairs, (1, 2, 40, 100, 1000)):
        routing = Routing(torch.zeros(tokens, count), config)
        dispatch.experts(tensor(tokens, width, dtype=dtype), routing, gate_up, down, "silu")


def norms(dtype: torch.dtype) -> None:
    """Norms of rows and of heads."""
    for size, offset, rows in product((96, 3584), (None, 1.0), (1, 100)):
        x, weight = tensor(rows, size, dtype=dtype), tensor(size, dtype=dtype)
        rms_norm(x, weight, 1e-6, offset=offset)
        rms_norm(x, weight, 1e-6, x, offset=offset)
        add_layer_norm_triton(x, x, weight, weight, 1e-6)
        heads = tensor(rows, 4, size, dtype=dtype)
        head_norms(heads[:, :2], heads[:, 2:], HeadNorms(weight, weight, 1e-6, offset))
        gated_norm_triton(heads, heads.flatten(1), weight, 1e-6)


def attention(dtype: torch.dtype, dim: int) -> None:
    """Attention over a cache, of one new token a sequence and of several."""
    heads, kv_heads = 8, 2
    angles = torch.zeros(64, dim // 2)
    for stored, window, cap in product((dtype, FP8), (None, 512), (None, 50.0)):
        cache, limits = kv_cache(kv_heads, dim, stored), {"scale": 0.1, "window": window, "cap": cap}
        for tokens, sight in product(([7, 1], [100], [2000]), ("causal", "both ways", "gaps")):
            meta = metadata(tokens, 4000, 4000)
            meta.key_ends = None if sight == "causal" else torch.zeros(sum(tokens), dtype=torch.int32)
            meta.gaps = sight == "gaps"
            dispatch.paged_attention(tensor(sum(tokens), heads, dim, dtype=dtype), cache, meta, **limits)
        weight = tensor(dim, dtype=dtype)
        for sequences, last, adjacent, axes in product((1, 100), (None, False, True), (False, True), (1, 3)):
            table = RotaryTable(
                angles, angles, (dim // 2 - 8, 4, 4) if axes == 3 else None, adjacent=adjacent
            )
            shape = (sequences,) if axes == 1 else (axes, sequences)
            q, k, v = tensor(sequences, heads + 2 * kv_heads, dim, dtype=dtype).split([heads, 2, 2], dim=1)
            positions = torch.zeros(shape, dtype=torch.int64)
            meta = metadata([1] * sequences, 1000, 4096)
            of_heads = None if last is None else HeadNorms(weight, weight, 1e-6, last=last)
            dispatch.decode_attention(q, k, v, positions, table, cache, meta, norms=of_heads, **limits)


def pictures(dtype: torch.dtype, dim: int) -> None:
    """Attention within images."""
    for length, images, counted in product((1000, 4000), (1, 2), (False, True)):
        q, k, v = tensor(images * length, 12, dim, dtype=dtype).split(4, dim=1)
        bounds = (torch.arange(images + 1) * length).to(torch.int32)
        counters = part_counters(CPU) if counted else None
        dispatch.vision_attention(q, k, v, bounds, max_len=length, scale=0.1, counters=counters)


def delta_nets(dtype: torch.dtype, dim: int) -> None:
    """Gated delta nets, and convolutions of both kinds."""
    heads = 4
    for tokens in ([1] * 4, [40, 1], [2100]):
        meta, count = metadata(tokens, 4000, 4000), sum(tokens)
        meta.state_rows = torch.zeros(len(tokens), dtype=torch.int64)
        cache = StateCache(tensor(2, 3, 4 * heads * dim, dtype=dtype), torch.zeros(2, heads, dim, dim))
        for gated, biased in product((False, True), (False, True)):
            channels = 4 * heads * dim
            x = tensor(count, 3 * channels if gated else channels, dtype=dtype)
            bias = tensor(channels, dtype=dtype) if biased else None
            conv_triton(x, tensor(channels, 4, dtype=dtype), bias, cache, meta, gated=gated)
        both, weights = tensor(count, 2 * heads, dtype=dtype), torch.zeros(2, heads)
        gates = DeltaGates(both[:, :heads], both[:, heads:], weights[0], weights[1])
        dispatch.delta_rule(tensor(count, 3 * heads * dim, dtype=dtype), gates, cache, meta)


def combinations() -> Iterator[Callable[[], None]]:
    for dtype in DTYPES:
        yield from (partial(linears, dtype, inputs) for inputs in INPUTS)
        yield from (partial(run, dtype) for run in (gates, activated, mixtures, norms, many))
        yield from (partial(attention, dtype, dim) for dim in (64, 96, 128, 256))
        yield from (partial(pictures, dtype, dim) for dim in (64, 72, 80, 128))
        yield from (partial(delta_nets, dtype, dim) for dim in (64, 128))


def on_hopper() -> None:
    """Make this process choose kernels as on an H100."""
    prepare()
    device._BACKEND = "triton"
    device.compute_capability = lambda _: (9, 0)
    gemm_activation.fills_gpu = lambda rows, *_: rows > 1000
    # What torch's own operations compute does not matter, and takes a third of the time.
    functional.linear = lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], len(weight))
    functional.layer_norm = lambda x, *_: torch.empty_like(x)
    dispatch.scaled_gemm = lambda x, weight, *_: tensor(len(x.numbers), len(weight))


class Built(Exception):
    """The front end has ended well."""


def build(variants: Sequence[Variant]) -> None:
    """Put ``variants`` through the front end and print a row for each."""

    def stop(self: ASTSource, *arguments: Any) -> None:
        make_of[type(self)](self, *arguments)
        raise Built

    make_of = {source: source.make_ir for source in (ASTSource, GluonASTSource)}
    for source in make_of:
        source.make_ir = stop
    for variant in variants:
        with suppress(Built):
            variant.compile()
        print(json.dumps({"kernel": variant.kernel.__name__}))


def main() -> None:
    on_hopper()
    variants = launched(list(combinations()))
    if "--wide" in sys.argv:
        compile_all(covering(variants))
        build(covering(variants, 2))
    else:
        build(covering(variants))


if __name__ == "__main__":
    sys.exit(main())
