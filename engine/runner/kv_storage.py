"""The tensors of the KV cache and of recurrent states, and how much memory they take."""

from __future__ import annotations

import torch

from engine.kernels.paged import KVCache
from engine.kernels.recurrent_state import StateCache
from engine.layers.decoder_config import DecoderConfig


def block_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype, tp_size: int = 1) -> int:
    """Bytes of one KV block over all layers on one tensor-parallel rank."""
    heads = max(1, config.num_kv_heads // tp_size)
    return 2 * config.num_attention_layers * heads * block_size * config.head_dim * dtype.itemsize


def state_bytes(config: DecoderConfig, dtype: torch.dtype, tp_size: int = 1) -> int:
    """Bytes of one sequence's recurrent states over all layers on one tensor-parallel rank."""
    net = config.delta_net
    if net is None:
        return 0
    conv = (net.conv_width - 1) * net.channels(tp_size) * dtype.itemsize
    recurrent = net.value_heads // tp_size * net.key_dim * net.value_dim * torch.float32.itemsize
    return len(config.linear_layers) * (conv + recurrent)


def allocate_caches(
    config: DecoderConfig,
    num_blocks: int,
    block_size: int,
    num_states: int,
    dtype: torch.dtype,
    device: torch.device,
    tp_size: int = 1,
) -> list[KVCache | StateCache]:
    """Allocate the cache of every layer: keys and values, or ``num_states`` recurrent states.

    Keys and values are zeroed, because padded rows of captured graphs read block 0: whatever lay in memory
    could be NaN, and a masked NaN still poisons a dot product.
    """
    heads = max(1, config.num_kv_heads // tp_size)
    shape = (num_blocks, heads, block_size, config.head_dim)

    def cache(layer: int) -> KVCache | StateCache:
        net = config.delta_net
        if net is None or layer not in config.linear_layers:
            return KVCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
        conv = (num_states, net.conv_width - 1, net.channels(tp_size))
        recurrent = (num_states, net.value_heads // tp_size, net.key_dim, net.value_dim)
        return StateCache(
            torch.zeros(conv, dtype=dtype, device=device),
            torch.zeros(recurrent, dtype=torch.float32, device=device),
        )

    return [cache(layer) for layer in range(config.num_layers)]


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
