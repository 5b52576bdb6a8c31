"""Sequences over scattered KV blocks, for tests of attention kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.kernels.paged import AttentionMetadata, KVCache


class PagedProblem:
    """Sequences whose blocks lie scattered in a cache; everything that kernels must not read is NaN.

    Attributes:
        cache: keys and values of all tokens before ``written`` of each sequence.
        meta: the batch; ``queries`` new tokens per sequence.
        contiguous: per sequence the keys and values ``(length, kv_heads, dim)`` in the cache, float32.
    """

    def __init__(self, device, dtype, *, lengths, queries, written, kv_heads, dim, block_size) -> None:
        needed = [-(-length // block_size) for length in lengths]
        order = (torch.randperm(sum(needed)) + 1).tolist()
        tables = torch.zeros((len(lengths), max(needed) + 1), dtype=torch.int32)
        keys, values = torch.full((2, sum(needed) + 1, kv_heads, block_size, dim), torch.nan)
        self.contiguous, slots = [], []
        for index, (length, count, end) in enumerate(zip(lengths, queries, written, strict=True)):
            blocks = [order.pop() for _ in range(needed[index])]
            tables[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            k, v = torch.randn(2, end, kv_heads, dim)
            for position in range(end):
                block, offset = blocks[position // block_size], position % block_size
                keys[block, :, offset], values[block, :, offset] = k[position], v[position]
            self.contiguous.append((k, v))
            slots += [
                blocks[position // block_size] * block_size + position % block_size
                for position in range(length - count, length)
            ]
        self.cache = KVCache(keys.to(device, dtype), values.to(device, dtype))
        self.meta = AttentionMetadata(
            block_tables=tables.to(device),
            query_start=torch.tensor([0, *queries]).cumsum(0).int().to(device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            max_query_len=max(queries),
            max_seq_len=4096,
        )


def clone(cache: KVCache) -> KVCache:
    return KVCache(cache.keys.clone(), cache.values.clone())


def double(cache: KVCache) -> KVCache:
    """Copy a cache in float64."""
    return KVCache(cache.keys.double(), cache.values.double())


def clone_metadata(meta: AttentionMetadata) -> AttentionMetadata:
    """Copy a batch with tensors of its own."""
    names = ("block_tables", "query_start", "seq_lens", "slot_mapping")
    return replace(meta, **{name: getattr(meta, name).clone() for name in names})
