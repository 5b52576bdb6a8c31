"""Facts about a device that kernels and the choice among them depend on."""

from __future__ import annotations

import functools
import os

import torch

#: A GEMM with at most this many input rows is memory-bound: reading the weight takes longest.
MEMORY_BOUND_ROWS = 64

_BACKEND = os.environ.get("SIGHTLINE_KERNELS", "auto")
if _BACKEND not in ("auto", "reference", "triton"):
    raise ValueError(f"SIGHTLINE_KERNELS must be auto, reference or triton, not {_BACKEND!r}")

# Without a GPU kernels run in Triton's interpreter (tests) or are only compiled, for Hopper.
_SMS_WITHOUT_GPU = 4
_SHARED_MEMORY_WITHOUT_GPU = 227 << 10


def use_triton(tensor: torch.Tensor) -> bool:
    """Return whether Triton kernels run on the device of ``tensor``: on GPUs, not on CPUs.

    The environment variable ``SIGHTLINE_KERNELS`` overrides this for comparisons: ``reference`` runs the
    torch references on a GPU too, ``triton`` runs the kernels everywhere.
    """
    if _BACKEND == "auto":
        return tensor.is_cuda
    return _BACKEND == "triton"


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors (SMs) of a GPU; a small number for a CPU."""
    if device.type != "cuda":
        return _SMS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use; Hopper's value for a CPU."""
    if device.type != "cuda":
        return _SHARED_MEMORY_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU, e.g. (9, 0) for Hopper; (0, 0) for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def is_hopper(device: torch.device) -> bool:
    """Return whether ``device`` is a Hopper GPU (sm_90)."""
    return compute_capability(device) == (9, 0)


def has_descriptor(matrix: torch.Tensor) -> bool:
    """Return whether a TMA descriptor can describe ``matrix``: rows contiguous, at multiples of 16 bytes."""
    row, column = matrix.stride()
    return column == 1 and row * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
