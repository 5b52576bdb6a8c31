"""The KV cache's tensors, and how many blocks of it there is room for."""

from __future__ import annotations

import torch

from engine.kernels.paged import KVCache
from engine.layers.decoder_config import DecoderConfig


def block_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype, tp_size: int = 1) -> int:
    """Bytes of one KV block over all layers on one tensor-parallel rank."""
    heads = max(1, config.num_kv_heads // tp_size)
    return 2 * config.num_layers * heads * block_size * config.head_dim * dtype.itemsize


def allocate_kv(
    config: DecoderConfig,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    tp_size: int = 1,
) -> list[KVCache]:
    """Allocate the KV cache of every layer.

    Zeroed, because padded rows of captured graphs read block 0: whatever lay in memory could be NaN, and a
    masked NaN still poisons a dot product.
    """
    heads = max(1, config.num_kv_heads // tp_size)
    shape = (num_blocks, heads, block_size, config.head_dim)
    return [
        KVCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
        for _ in range(config.num_layers)
    ]


def measure_free_bytes(device: torch.device, utilization: float) -> int:
    """Bytes of a GPU that this process may still take, when it may use ``utilization`` of the whole card.

    Counts what this process's allocator reserved at its peak, and half a GiB for the context and libraries.
    What other processes hold limits it too.
    """
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_reserved(device)
    reserved = torch.cuda.memory_reserved(device)
    own = int(total * utilization) - peak - (512 << 20)
    return max(0, min(own, free - (peak - reserved) - (256 << 20)))
