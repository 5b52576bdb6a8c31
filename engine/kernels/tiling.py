"""How a kernel cuts up a problem."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

#: Rows up to which a product with a weight is bound by reading it.
FEW_ROWS = 64

_PROCESSORS_WITHOUT_GPU = 4
_MEMORY_WITHOUT_GPU = 227 << 10


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few where there is none."""
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use on a GPU; those of a Hopper GPU where there is none."""
    if device.type != "cuda":
        return _MEMORY_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def nvidia_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, (9, 0) for Hopper's; (0, 0) of everything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows and keys per tile of an attention kernel, and how the compiler schedules them."""

    rows: int
    keys: int
    warps: int
    stages: int
