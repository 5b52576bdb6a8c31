"""Attention cases: decode, prefill and both mixed over the paged cache, vision, and windows of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels_timing import Case, Problem, Work, dtype_on
from engine.kernels.dispatch import decode_attention, paged_attention, vision_attention
from engine.kernels.fp8 import FP8
from engine.kernels.grid_attention import grid_attention, grid_attention_reference
from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.paged_attention import paged_attention_reference
from engine.kernels.rotary import RotaryTable
from engine.kernels.shares import part_counters
from engine.kernels.vision_attention import vision_attention_reference

BLOCK = 16
#: (sequences, context, query heads, KV heads, head size)
DECODE = [
    (32, 4096, 32, 8, 128),
    (1, 1024, 32, 8, 128),
    (64, 1024, 12, 2, 128),
    (64, 1024, 28, 4, 128),
    (64, 1024, 32, 32, 128),
]
TINY_DECODE = [(2, 40, 4, 2, 16)]
#: (tokens, query heads, KV heads, head size)
PREFILL = [(2**power, 32, 8, 128) for power in range(9, 15)]
TINY_PREFILL = [(40, 4, 2, 16)]
#: (decoding sequences, their context, new tokens of the prompt chunk, context including them, heads as above)
MIXED = [(32, 4096, 2048, 4096, 32, 8, 128), (32, 1024, 2048, 2048, 12, 2, 128)]
TINY_MIXED = [(2, 40, 20, 40, 4, 2, 16)]
#: (images, patches of each, heads, head size)
VISION = [(1, 1600, 16, 80), (1, 10764, 16, 80), (16, 1600, 16, 80), (8, 729, 16, 72)]
TINY_VISION = [(1, 36, 2, 80), (3, 16, 2, 80)]
#: (images, patches of a side, of a window's side, heads, head size)
GRID = [(1, 64, 64, 12, 64), (6, 48, 48, 12, 64), (1, 64, 14, 12, 64), (6, 48, 14, 12, 64)]
TINY_GRID = [(2, 5, 5, 2, 16), (1, 5, 3, 2, 16)]
#: Last tokens of a long prompt that are compared; the reference holds all their scores at once.
COMPARED = 256


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    for sizes in TINY_DECODE if tiny else DECODE:
        label = "{}x{}, heads {}/{}, D {}".format(*sizes)
        yield Case("paged_decode", label, partial(decode, device, *sizes))
        yield Case("fp8_decode", label, partial(decode, device, *sizes, fp8=True))
    for sizes in TINY_PREFILL if tiny else PREFILL:
        label = "{}, heads {}/{}, D {}".format(*sizes)
        yield Case("paged_prefill", label, partial(prefill, device, *sizes))
        yield Case("fp8_prefill", label, partial(prefill, device, *sizes, fp8=True))
    for sizes in TINY_MIXED if tiny else MIXED:
        label = "{}x{} + {}/{}, heads {}/{}".format(*sizes[:6])
        yield Case("paged_mixed", label, partial(mixed, device, *sizes))
    for sizes in TINY_VISION if tiny else VISION:
        label = "{}x{}, heads {}, D {}".format(*sizes)
        yield Case("vision", label, partial(vision, device, *sizes))
    for sizes in TINY_GRID if tiny else GRID:
        label = "{}x{}², windows of {}², heads {}, D {}".format(*sizes)
        yield Case("grid_attention", label, partial(grids, device, *sizes))


class Paged:
    """Sequences over scattered blocks: ``lengths`` tokens each, of which the last ``queries`` are new.

    If each has one new token, that token is not rotated (angle 0), so that decode attention writes the same
    key to the cache again.

    Args:
        fp8: the cache holds keys and values in fp8.
    """

    def __init__(self, device, lengths, queries, heads, kv_heads, dim, *, fp8: bool = False) -> None:
        self.device, self.lengths, self.queries = device, lengths, queries
        dtype = dtype_on(device)
        needed = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(needed), dtype=torch.int32)
        tables = torch.zeros((len(lengths), max(needed)), dtype=torch.int32)
        for row, (first, last) in enumerate(pairwise(accumulate(needed, initial=0))):
            tables[row, : last - first] = order[first:last]
        shape = (sum(needed), kv_heads, BLOCK, dim)
        keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        self.cache = KVCache(keys.to(FP8), values.to(FP8)) if fp8 else KVCache(keys, values)
        self.q = torch.randn((sum(queries), heads, dim), device=device, dtype=dtype)
        self.starts = list(accumulate(queries, initial=0))
        last = torch.tensor(lengths) - 1
        slots = tables.gather(1, (last // BLOCK)[:, None])[:, 0].long() * BLOCK + last % BLOCK
        self.meta = AttentionMetadata(
            block_tables=tables.to(device),
            query_start=torch.tensor(self.starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            # Only decode attention writes to the cache.
            slot_mapping=slots.to(device),
            max_query_len=max(queries),
            max_seq_len=max(lengths),
            split_counters=torch.zeros((len(lengths), kv_heads), dtype=torch.int32, device=device),
        )
        self.options = {"scale": dim**-0.5}
        self.decodes = max(queries) == 1
        if self.decodes:
            block, offset = (slots // BLOCK).to(device), (slots % BLOCK).to(device)
            self.k, self.v = (x[block, :, offset] for x in (keys, values))
            self.positions = torch.zeros(len(lengths), dtype=torch.int64, device=device)
            angles = torch.zeros((1, dim // 2), device=device)
            self.table = RotaryTable(angles.cos(), angles.sin())

    def run(self) -> torch.Tensor:
        if not self.decodes:
            return paged_attention(self.q, self.cache, self.meta, **self.options)
        new = (self.q, self.k, self.v, self.positions, self.table)
        return decode_attention(*new, self.cache, self.meta, **self.options)

    def check(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare the last tokens of each sequence with the reference in float32."""
        counts = [min(count, COMPARED) for count in self.queries]
        ends = self.starts[1:]
        kept = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
        starts = torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)
        kept = kept.to(self.device)
        last = replace(self.meta, query_start=starts)
        expected = paged_attention_reference(self.q[kept].float(), self.cache, last, **self.options)
        return self.run()[kept], expected

    def kv_bytes(self) -> float:
        """Bytes of the keys and values of all tokens."""
        _, kv_heads, _, dim = self.cache.keys.shape
        return 2.0 * sum(self.lengths) * kv_heads * dim * self.cache.keys.element_size()

    def operations(self) -> float:
        """Operations of two matmuls over the keys that each new token sees."""
        pairs = zip(self.lengths, self.queries, strict=True)
        visible = sum(count * length - count * (count - 1) / 2 for length, count in pairs)
        return 4.0 * visible * self.q.shape[1] * self.q.shape[2]


def decode(device, sequences, context, heads, kv_heads, dim, *, fp8: bool = False) -> Problem:
    paged = Paged(device, [context] * sequences, [1] * sequences, heads, kv_heads, dim, fp8=fp8)
    peers = {}
    if device.type == "cuda":
        k, v = (
            torch.randn((sequences, kv_heads, context, dim), device=device, dtype=paged.q.dtype) for _ in "kv"
        )
        q = paged.q[:, :, None].contiguous()
        peers = sdpa_peers(q, k, v, causal=False) | flex_peer(q, k, v)
    return Problem(paged.run, paged.check, paged.kv_bytes(), peers=peers)


def prefill(device, tokens, heads, kv_heads, dim, *, fp8: bool = False) -> Problem:
    paged = Paged(device, [tokens], [tokens], heads, kv_heads, dim, fp8=fp8)
    peers = {}
    if device.type == "cuda":
        k, v = (torch.randn((1, kv_heads, tokens, dim), device=device, dtype=paged.q.dtype) for _ in "kv")
        peers = sdpa_peers(paged.q.transpose(0, 1)[None].contiguous(), k, v, causal=True)
    return Problem(paged.run, paged.check, paged.operations(), compute=True, peers=peers)


def mixed(device, sequences, context, chunk, chunk_context, heads, kv_heads, dim) -> Problem:
    lengths, queries = [context] * sequences + [chunk_context], [1] * sequences + [chunk]
    paged = Paged(device, lengths, queries, heads, kv_heads, dim)
    # The same batch in two launches: decodes, then the chunk.
    apart = [
        Paged(device, lengths[:-1], queries[:-1], heads, kv_heads, dim),
        Paged(device, lengths[-1:], queries[-1:], heads, kv_heads, dim),
    ]
    peers: dict[str, Work] = {"apart": lambda: [part.run() for part in apart]}
    return Problem(paged.run, paged.check, paged.operations(), compute=True, peers=peers)


def vision(device, images, patches, heads, dim) -> Problem:
    fused = torch.randn((images * patches, 3, heads, dim), device=device, dtype=dtype_on(device))
    q, k, v = fused.unbind(1)
    bounds = torch.arange(images + 1, dtype=torch.int32, device=device) * patches
    options = {"max_len": patches, "scale": dim**-0.5}
    counters = part_counters(device)

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        wide = (x.float() for x in (q, k, v))
        result = vision_attention(q, k, v, bounds, counters=counters, **options)
        return result, vision_attention_reference(*wide, bounds, **options)

    def per_image() -> None:
        for image in range(images):
            part = fused[image * patches : (image + 1) * patches].permute(1, 2, 0, 3)[:, None]
            F.scaled_dot_product_attention(*part.unbind(0))

    operations = 4.0 * images * patches**2 * heads * dim
    peers: dict[str, Work] = {"sdpa per image": per_image}
    run = partial(vision_attention, q, k, v, bounds, counters=counters, **options)
    return Problem(run, check, operations, compute=True, peers=peers)


def grids(device, images, side, window, heads, dim) -> Problem:
    fused = torch.randn((images * side**2, 3 * heads, dim), device=device, dtype=dtype_on(device))
    q, k, v = fused.split(heads, dim=1)
    table = torch.randn((triton.cdiv(4 * window, 8) * 8, dim), device=device, dtype=fused.dtype)
    empty = torch.randn((2, heads, dim), device=device, dtype=fused.dtype)
    options = {"side": side, "window": window, "scale": dim**-0.5}

    def reference(dtype: torch.dtype) -> torch.Tensor:
        wide = (x.to(dtype) for x in (q, k, v, q @ table.T))
        return grid_attention_reference(*wide, empty.to(dtype).unbind(), **options)

    run = partial(grid_attention, q, k, v, table, empty.unbind(), **options)
    operations = 4.0 * images * side**2 * window**2 * heads * dim
    peers: dict[str, Work] = {"sdpa with its scores": partial(reference, q.dtype)}
    return Problem(run, lambda: (run(), reference(torch.float32)), operations, compute=True, peers=peers)


def sdpa_peers(q, k, v, *, causal: bool) -> dict[str, Work]:
    """Return torch's attention by backend, on contiguous ``(B, H, S, D)``."""

    def call(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {name: partial(call, backend) for name, backend in backends.items()}


def flex_peer(q, k, v) -> dict[str, Work]:
    """Return FlexAttention, compiled for these sizes; nothing where torch lacks it."""
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return {}
    compiled = torch.compile(flex_attention, dynamic=False)
    return {"flex": lambda: compiled(q, k, v, enable_gqa=True)}
