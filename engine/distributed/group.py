"""The tensor-parallel group: handed to whoever needs it, never global."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist


class TensorParallelGroup(Protocol):
    """Ranks that share one model. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns ``tensor``."""

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate every rank's equally shaped ``tensor`` along ``dim``, in rank order."""

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite ``tensor`` with that of rank ``source``; returns it."""

    def close(self) -> None:
        """Leave the group."""


class SingleProcessGroup:
    """A group of one: every operation is free."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        return tensor

    def close(self) -> None:
        pass


class TorchGroup:
    """A group over ``torch.distributed``: NCCL between GPUs, gloo between CPU processes."""

    def __init__(self, process_group: Any) -> None:
        self._group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)

    @classmethod
    def join(
        cls, *, rank: int, size: int, address: str, device: torch.device, timeout_s: float = 300.0
    ) -> TorchGroup:
        """Meet the other ranks and make the process's group.

        Args:
            address: ``host:port`` on which rank 0 listens.
            device: where the group's tensors live; decides between NCCL and gloo.
            timeout_s: how long to wait for the others, here and in every later operation.
        """
        from datetime import timedelta

        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
        return cls(dist.group.WORLD)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        parts = torch.empty(self.size, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
        dist.all_gather(list(parts.unbind(0)), tensor.contiguous(), group=self._group)
        return torch.cat(parts.unbind(0), dim=dim)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        dist.broadcast(tensor, src=dist.get_global_rank(self._group, source), group=self._group)
        return tensor

    def close(self) -> None:
        dist.destroy_process_group(self._group)
