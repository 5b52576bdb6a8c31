"""Asynchronous copies between host and device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy ``array`` to ``device``, with its dtype."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # PyTorch's allocator of pinned memory keeps the block until the copy is finished.
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_shared(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """As :func:`upload`, of a large array that may be read-only and shared with other processes.

    It isn't read after the return. A copy to a GPU from memory that isn't pinned would first wait for all
    work that is enqueued.
    """
    staged = staging(array.shape, _torch_dtype(array), device)
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=True)


def staging(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory of any content, from which ``to(device, non_blocking=True)`` copies without waiting.

    On a GPU it is memory that was used before: fresh memory costs more to write to than its pages do.
    """
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def upload_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy ``arrays`` to ``device`` at once, each with its dtype; the results are views of one tensor."""
    # As tensors of their own do, each begins at a multiple of 16 bytes.
    starts = [0, *accumulate(-(-array.nbytes // 16) * 16 for array in arrays)]
    staged = staging((starts[-1],), torch.uint8, device)
    host = staged.numpy()
    for array, start in zip(arrays, starts, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = staged.to(device, non_blocking=True)
    return [
        sent[start : start + array.nbytes].view(_torch_dtype(array)).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def download(tensor: torch.Tensor) -> torch.Tensor:
    """Start copying ``tensor`` to the host.

    The copy is valid once an event recorded after this call has passed. Later writes to ``tensor`` don't
    reach it.
    """
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


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
