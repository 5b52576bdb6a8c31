"""Many small host arrays to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch

from engine.runner.logprobs import LogprobTensors


def upload(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy int64-convertible arrays to ``device`` together; the results are int64 views of one tensor.

    On a GPU the copy goes through fresh pinned memory and doesn't wait; PyTorch's pinned allocator keeps the
    memory until the copy is through.
    """
    flat = [np.ascontiguousarray(array, dtype=np.int64).reshape(-1) for array in arrays.values()]
    host = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        host = host.pin_memory().to(device, non_blocking=True)
    views: dict[str, torch.Tensor] = {}
    offset = 0
    for name, array in arrays.items():
        views[name] = host[offset : offset + array.size].view(array.shape)
        offset += array.size
    return views


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
