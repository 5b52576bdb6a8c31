"""Loads one rank's share of a language model, and makes the runner that computes with it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.distributed.group import TensorParallelGroup
from engine.errors import ConfigError
from engine.families.base import ModelConfig
from engine.families.load import load_language_model
from engine.fit import longest_sequence
from engine.graphs import make_capture
from engine.kernels.fp8 import reads_fp8
from engine.layers.decoder import Decoder
from engine.layers.layer_groups import LayerGroups
from engine.placement import open_device, resolve_device, resolve_dtype
from engine.runner.kv_storage import (
    allocate_caches,
    block_bytes,
    kv_dtype,
    measure_free_bytes,
    num_snapshots,
    state_bytes,
)
from engine.runner.model_runner import ModelRunner
from engine.startup import StartTimes

#: Where a container finds the limit of its memory: control groups of version 2, and of version 1.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def _host_bytes() -> int:
    """Bytes of memory that the processes of this host or container may use together."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in _MEMORY_LIMITS:
        # Outside of containers the file may be missing, or say "max".
        with suppress(OSError, ValueError):
            there = min(there, int(file.read_text()))
    return there


@dataclass(slots=True)
class ModelRank:
    """The loaded weights of one rank. All ranks make the same calls in the same order, because they compute
    together.

    Attributes:
        max_model_len: longest sequence in tokens, not yet limited by the number of KV blocks.
        groups: of the decoder's layers.
        times: gets the phases of all calls.
    """

    config: EngineConfig
    model: ModelConfig
    decoder: Decoder
    group: TensorParallelGroup
    max_model_len: int
    groups: LayerGroups
    times: StartTimes
    _compiled: bool = field(default=False, init=False)

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        checkpoint: Checkpoint,
        model: ModelConfig,
        group: TensorParallelGroup,
        times: StartTimes,
    ) -> ModelRank:
        """Load this rank's share of the weights.

        Raises:
            CheckpointError: see :func:`engine.families.load.load_language_model`.
            ConfigError: ``max_model_len`` is more than the model was made for, or the GPU can't read an fp8
                KV cache.
        """
        device = rank_device(config, group.rank)
        if config.kv_cache_dtype == "fp8" and not reads_fp8(device):
            raise ConfigError(
                "kv_cache_dtype fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper); use auto",
                param="kv_cache_dtype",
            )
        max_model_len = longest_sequence(config, model)
        with times.phase("device"):
            open_device(device)
        with times.phase("weights"):
            decoder = load_language_model(
                checkpoint,
                model,
                device=device,
                dtype=resolve_dtype(config, model),
                tp=group,
                load_format=config.load_format,
                seed=config.seed,
                max_model_len=max_model_len,
                vectors_only=config.task == "embed",
                quantization=config.quantization,
            )
        groups = LayerGroups.of(model.decoder, max_model_len, group.size)
        return cls(config, model, decoder, group, max_model_len, groups, times)

    def measure_blocks(self) -> int:
        """Return the number of KV blocks that fit into this rank's memory.

        Recurrent states of all slots are counted too: on a GPU they are part of the measured peak, elsewhere
        of ``kv_cache_bytes``.

        Raises:
            ConfigError: fewer than two fit; block 0 is never given to a request.
        """
        config, decoder = self.config, self.decoder
        states = (config.max_num_seqs + 1) * state_bytes(decoder.config, decoder.dtype, self.group.size)
        free = config.kv_cache_bytes - states
        if decoder.device.type == "cuda":
            free = torch.cuda.mem_get_info(decoder.device)[0] - states
        if free < 0:
            raise ConfigError(
                f"the recurrent states of max_num_seqs {config.max_num_seqs} requests take {states >> 20} "
                f"MiB, {-free >> 20} MiB more than there are; lower max_num_seqs (or raise kv_cache_bytes on "
                "a CPU)",
                param="max_num_seqs",
            )
        if decoder.device.type == "cuda":
            runner = self._runner(2, self.max_model_len, config.max_num_seqs, 0)
            with self.times.phase("free memory"):
                runner.profile(config.max_num_batched_tokens)
                del runner
                torch.cuda.synchronize(decoder.device)
                torch.cuda.empty_cache()
            free = measure_free_bytes(decoder.device, config.gpu_memory_utilization)
        if states and config.enable_prefix_caching:
            kept = config.state_snapshot_bytes
            free = max(0, free - (free // 4 if kept is None else kept))
        num_blocks = free // self._block_bytes
        if num_blocks < 2:
            raise self._no_room(free)
        return num_blocks

    @property
    def _block_bytes(self) -> int:
        return block_bytes(self.groups, self.config.block_size, kv_dtype(self.config, self.decoder.dtype))

    def _no_room(self, free: int) -> ConfigError:
        """The refusal of ``free`` bytes for KV blocks, too few for two."""
        text = f"{free} bytes are left for KV blocks, of which two take {2 * self._block_bytes}"
        if self.decoder.device.type == "cuda":
            return ConfigError(
                f"{text}; raise gpu_memory_utilization, or lower max_num_batched_tokens or block_size",
                param="gpu_memory_utilization",
            )
        return ConfigError(f"{text}; raise kv_cache_bytes, or lower block_size", param="kv_cache_bytes")

    def check_blocks(self, num_blocks: int) -> None:
        """Check that this rank can hold so many KV blocks: all of a GPU's memory that is free, or all memory
        of a host or container.

        Raises:
            ConfigError: it can't. On a CPU the process would be killed once they fill.
        """
        needed = num_blocks * self._block_bytes
        if (device := self.decoder.device).type == "cuda":
            # What the allocator holds and nothing uses, such as room for weights as read, counts too.
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            there = torch.cuda.mem_get_info(device)[0] + unused
        else:
            there = _host_bytes()
        if needed > there:
            measured = "gpu_memory_utilization" if device.type == "cuda" else "kv_cache_bytes"
            field = measured if self.config.num_kv_blocks is None else "num_kv_blocks"
            raise ConfigError(
                f"{field} is {getattr(self.config, field)}, which takes {needed >> 20} MiB, but there are "
                f"{there >> 20} MiB; lower it, or leave it out",
                param=field,
            )

    def make_runner(self, num_blocks: int, max_model_len: int, num_slots: int) -> ModelRunner:
        """Make the runner with its KV cache, ready for requests."""
        snapshots = num_snapshots(self.config, self.decoder.config, self.decoder.dtype, num_blocks)
        runner = self._runner(num_blocks, max_model_len, num_slots, snapshots)
        runner.warm_up(self.times)
        return runner

    def _runner(self, num_blocks: int, max_model_len: int, num_slots: int, snapshots: int) -> ModelRunner:
        config, decoder = self.config, self.decoder
        with self.times.phase("KV cache"):
            caches = allocate_caches(
                decoder.config,
                self.groups,
                num_blocks,
                config.block_size,
                # A row for each slot, one for padding, and the snapshots.
                num_slots + 1 + snapshots,
                decoder.dtype,
                decoder.device,
                self.group.size,
                kv_dtype=kv_dtype(config, decoder.dtype),
                kv_scales=decoder.kv_scales() if config.kv_cache_dtype == "fp8" else (),
            )
            runner = ModelRunner(
                decoder,
                caches,
                block_size=config.block_size,
                num_slots=num_slots,
                max_num_tokens=config.max_num_batched_tokens,
                max_model_len=max_model_len,
                pooling=config.task != "generate",
                capture=make_capture(decoder.device, enforce_eager=config.enforce_eager),
                group=self.group,
            )
        if not self._compiled:
            with self.times.phase("kernels"):
                runner.compile()
            self._compiled = True
        return runner


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: a GPU of its own, in the order of ranks; PyTorch's default if there is one rank.

    On each of several hosts PyTorch sees as many GPUs as the host has ranks.
    """
    device = resolve_device(config)
    if device.type == "cuda" and config.tensor_parallel_size > 1:
        return torch.device("cuda", rank % torch.cuda.device_count())
    return device


def check_gpus(config: EngineConfig, ranks_here: int) -> None:
    """Check that every rank of this host has a GPU.

    Raises:
        ConfigError: the host has fewer GPUs than ranks; or more, where it is one of several hosts.
    """
    size = config.tensor_parallel_size
    if size == 1 or resolve_device(config).type != "cuda":
        return
    count = torch.cuda.device_count()
    if ranks_here > count or (ranks_here < size and ranks_here != count):
        raise ConfigError(
            f"tensor_parallel_size is {size}, but PyTorch sees {count} GPU{'s' * (count > 1)} here and every "
            "rank needs its own" + f": {ranks_here} on each host" * (ranks_here < size),
            param="tensor_parallel_size",
        )
