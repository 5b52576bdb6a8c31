"""Asynchronous copies between host and device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.logprobs import LogprobTensors


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy ``array`` to ``device``, with its dtype."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # PyTorch's allocator of pinned memory keeps the block until the copy is finished.
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_shared(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """As :func:`upload`, of a large array that may be read-only and shared with other processes.

    A copy to a GPU from memory that isn't pinned would first wait for all work that is enqueued.
    """
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    staged = staging(array.shape, dtype, device)
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=True)


def staging(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory of any content, from which ``to(device, non_blocking=True)`` copies without waiting.

    On a GPU it is memory that was used before: fresh memory costs more to write to than its pages do.
    """
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def upload_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """One copy of several arrays on ``device``, as int64; the results are views of one tensor."""
    # Each begins at a multiple of 16 bytes, as tensors of their own do: Triton compiles a kernel once more
    # for other pointers.
    sizes = [array.size + array.size % 2 for array in arrays]
    joined = np.zeros(sum(sizes), np.int64)
    offset = 0
    for array, size in zip(arrays, sizes, strict=True):
        joined[offset : offset + array.size] = array.reshape(-1)
        offset += size
    parts = upload(joined, device).split(sizes)
    return [part[: array.size].view(array.shape) for array, part in zip(arrays, parts, strict=True)]


def download(tensor: torch.Tensor) -> torch.Tensor:
    """Start copying ``tensor`` to the host.

    The copy is valid once an event recorded after this call has passed. Later writes to ``tensor`` don't
    reach it.
    """
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def download_logprobs(found: LogprobTensors) -> LogprobTensors:
    """Start copying each tensor of ``found`` to the host; see :func:`download`."""
    return LogprobTensors(
        download(found.token_logprobs),
        download(found.ranks),
        download(found.top_ids),
        download(found.top_logprobs),
    )


def record_event(device: torch.device, *, idle_wait: bool = False) -> torch.cuda.Event | None:
    """Record an event after all work enqueued so far; None on a CPU, where nothing is asynchronous.

    Args:
        idle_wait: ``synchronize`` leaves its core to others. By default it asks the device again and again,
            and returns some tens of microseconds sooner.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=idle_wait)
    event.record()
    return event
