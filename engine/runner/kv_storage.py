"""The tensors of the KV cache and of recurrent states, and how much memory they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from engine.config import EngineConfig
from engine.kernels.fp8 import FP8
from engine.kernels.paged import KVCache
from engine.kernels.recurrent_state import StateCache
from engine.layers.decoder_config import DecoderConfig
from engine.layers.layer_groups import LayerGroups


def kv_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of keys and values in the cache of a model of ``dtype``."""
    return FP8 if config.kv_cache_dtype == "fp8" else dtype


def block_bytes(groups: LayerGroups, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block on one tensor-parallel rank.

    Args:
        groups: made for that rank's share of KV heads.
        dtype: of keys and values.
    """
    return 2 * groups.size * groups.width * block_size * dtype.itemsize


def state_bytes(config: DecoderConfig, dtype: torch.dtype, tp_size: int = 1) -> int:
    """Bytes of one sequence's recurrent states over all layers on one tensor-parallel rank."""
    net = config.recurrence
    if net is None:
        return 0
    conv = (net.conv_width - 1) * net.channels(tp_size) * dtype.itemsize
    recurrent = prod(net.recurrent_shape(tp_size)) * torch.float32.itemsize
    return len(config.linear_layers) * (conv + recurrent)


def num_snapshots(config: EngineConfig, decoder: DecoderConfig, dtype: torch.dtype, num_blocks: int) -> int:
    """Copies of recurrent states that are kept for the prefix cache, the same on all ranks.

    Args:
        num_blocks: KV blocks; without ``state_snapshot_bytes`` a third of their memory is taken, so that
            snapshots have a quarter of both. All attention layers are in one group.
    """
    size = config.tensor_parallel_size
    each = state_bytes(decoder, dtype, size)
    if not each or not config.enable_prefix_caching:
        return 0
    budget = config.state_snapshot_bytes
    if budget is None:
        stored, groups = kv_dtype(config, dtype), LayerGroups.single(decoder, size)
        budget = num_blocks * block_bytes(groups, config.block_size, stored) // 3
    return budget // each


@dataclass(frozen=True, slots=True)
class Caches:
    """The caches of a decoder on one rank.

    Attributes:
        layers: of each layer: keys and values, or recurrent states.
        num_groups: groups of layers, each of which has its own block tables.
        conv, recurrent: the states of all layers that have such, ``(layers, rows, ...)``; see
            :class:`StateCache`. None for models without states.
    """

    layers: list[KVCache | StateCache]
    num_groups: int
    conv: torch.Tensor | None = None
    recurrent: torch.Tensor | None = None

    def copy_state(self, source: int, target: int) -> None:
        """Copy the states of all layers from one row to another."""
        for states in (self.conv, self.recurrent):
            assert states is not None
            states[:, target].copy_(states[:, source])


def allocate_caches(
    config: DecoderConfig,
    groups: LayerGroups,
    num_blocks: int,
    block_size: int,
    num_states: int,
    dtype: torch.dtype,
    device: torch.device,
    tp_size: int = 1,
    *,
    kv_dtype: torch.dtype | None = None,
    kv_scales: Sequence[tuple[float, float]] = (),
) -> Caches:
    """Allocate the cache of every layer: keys and values, or ``num_states`` recurrent states.

    The first places of all groups have the same tensors, and so on: a block belongs to one group at a time.
    Layers that borrow keys and values have the cache of the layer that they borrow from.

    Keys and values are zeroed, because padded rows of captured graphs read block 0: whatever lay in memory
    could be NaN, and a masked NaN still poisons a dot product.

    Args:
        dtype: of the model.
        kv_dtype: of keys and values, if it is another.
        kv_scales: the scales of each layer's keys and values, if they are in fp8.
    """

    def zeros() -> torch.Tensor:
        return torch.zeros((num_blocks, groups.width * block_size), dtype=kv_dtype or dtype, device=device)

    def part(whole: torch.Tensor, layer: int, index: int) -> torch.Tensor:
        """The share that the ``index``-th layer of a place has, see :class:`KVCache`."""
        width, head_dim = config.kv_width(layer, tp_size), config.heads_of(layer)[1]
        first, count = index * width * block_size, width * block_size
        return whole[:, first : first + count].unflatten(1, (-1, block_size, head_dim))

    pairs = [(zeros(), zeros()) for _ in range(groups.size)]
    found: dict[int, KVCache | StateCache] = {
        layer: KVCache(
            part(keys, layer, index),
            part(values, layer, index),
            *(kv_scales[layer] if kv_scales else (1.0, 1.0)),
            group,
        )
        for group, members in enumerate(groups.members)
        for place, (keys, values) in zip(members, pairs, strict=False)
        for index, layer in enumerate(place)
    }
    found |= {layer: found[config.keys_of(layer)] for layer in config.borrowing_layers}
    number = len(groups.members)
    net = config.recurrence
    if net is None:
        return Caches([found[layer] for layer in range(config.num_layers)], number)
    rows = (len(config.linear_layers), num_states)
    conv = torch.zeros((*rows, net.conv_width - 1, net.channels(tp_size)), dtype=dtype, device=device)
    recurrent = torch.zeros((*rows, *net.recurrent_shape(tp_size)), device=device)
    for index, layer in enumerate(config.linear_layers):
        found[layer] = StateCache(conv[index], recurrent[index])
    return Caches([found[layer] for layer in range(config.num_layers)], number, conv, recurrent)


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
