"""How a kernel cuts up a problem."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_PROCESSORS_WITHOUT_GPU = 4


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few where there is none."""
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows and keys per tile of an attention kernel, and how the compiler schedules them."""

    rows: int
    keys: int
    warps: int
    stages: int
