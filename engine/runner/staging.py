"""Many small host arrays to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch

from engine.logprobs import LogprobTensors


def upload(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy int64-convertible arrays to ``device`` together; the results are int64 views of one tensor.

    On a GPU the copy goes through fresh pinned memory and doesn't wait; PyTorch's pinned allocator keeps the
    memory until the copy is through.
    """
    # Each begins at 16 bytes, as tensors of their own do: for others kernels would be compiled once more.
    sizes = [array.size + array.size % 2 for array in arrays.values()]
    joined = np.zeros(sum(sizes), np.int64)
    offset = 0
    for array, size in zip(arrays.values(), sizes, strict=True):
        joined[offset : offset + array.size] = array.reshape(-1)
        offset += size
    host = torch.from_numpy(joined)
    if device.type == "cuda":
        host = host.pin_memory().to(device, non_blocking=True)
    return {
        name: part[: array.size].view(array.shape)
        for (name, array), part in zip(arrays.items(), host.split(sizes), strict=True)
    }


def download(tensor: torch.Tensor) -> torch.Tensor:
    """Start copying ``tensor`` to the host; valid once an event recorded after it has passed. What overwrites
    the tensor afterwards doesn't reach the copy."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def download_logprobs(found: LogprobTensors) -> LogprobTensors:
    """As :func:`download`, for each tensor of ``found``."""
    return LogprobTensors(
        download(found.token_logprobs),
        download(found.ranks),
        download(found.top_ids),
        download(found.top_logprobs),
    )


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """An event after everything enqueued so far; None where nothing is asynchronous."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
