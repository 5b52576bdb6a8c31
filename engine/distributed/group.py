"""The tensor-parallel group: handed to whoever needs it, never global."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


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

    def abort(self) -> None:
        """Leave the group, whatever the others do: operations that still wait for them fail or end.

        Returns at once; may be called from any thread, and repeatedly.
        """

    def close(self) -> None:
        """As :meth:`abort`, and wait until nothing is left of it.

        Recorded work that used it must be gone, and where the ranks met must still be there.
        """


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

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class TorchGroup:
    """A group over ``torch.distributed``: NCCL between GPUs, gloo between CPU processes.

    It is apart from PyTorch's global group, so that a process may be in several, one after the other or at
    once.
    """

    def __init__(self, backend: Any, device: torch.device) -> None:
        self._backend: Any = backend
        self.rank: int = backend.rank()
        self.size: int = backend.size()
        self._on_gpu = device.type == "cuda"
        self._aborted, self._gone, self._stuck = threading.Event(), threading.Event(), False
        # Started early, since an interpreter at its end starts no more. It also keeps the backend from the
        # collector, which would wait there for recorded work that it has still to collect.
        self._aborting = threading.Thread(
            target=_abort_when, args=(self._aborted, self._gone, backend), name="group-abort", daemon=True
        )
        self._aborting.start()

    @classmethod
    def join(
        cls, *, rank: int, size: int, address: str, device: torch.device, timeout_s: float = 300.0
    ) -> TorchGroup:
        """Meet the other ranks.

        Args:
            address: where they meet: ``tcp://host:port`` on which rank 0 listens, or ``file:///path`` of a
                file that doesn't exist yet, for ranks of one host.
            device: where the group's tensors live; decides between NCCL and gloo.
            timeout_s: how long to wait for the others, here and in every later operation.
        """
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(dist.rendezvous(address, rank, size, timeout=timeout))
        store.set_timeout(timeout)
        make = _nccl if device.type == "cuda" else _gloo
        backend = make(store, rank, size, timeout, local=urlsplit(address).hostname in _LOCAL)
        backend._set_sequence_number_for_group()
        if device.type == "cuda":
            backend.eager_connect_single_device(device)
        return cls(backend, device)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        options = c10d.AllreduceOptions()
        options.asyncOp = False
        self._wait(self._backend.allreduce([tensor], options))
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        rows = torch.empty(
            self.size * tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device
        )
        # Backends differ in what they make of nothing.
        if rows.numel():
            options = c10d.AllgatherOptions()
            options.asyncOp = False
            self._wait(self._backend._allgather_base(rows, tensor.contiguous(), options))
        return torch.cat(rows.unflatten(0, (self.size, tensor.shape[0])).unbind(0), dim=dim)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        options = c10d.BroadcastOptions()
        options.rootRank = source
        options.asyncOp = False
        self._wait(self._backend.broadcast([tensor], options))
        return tensor

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        self.abort()
        if not self._stuck:
            self._gone.set()
            self._aborting.join(_CLOSE_S)
        # The last reference to it, unless something of it is stuck: going, it waits for its own threads.
        self._backend = None

    def _wait(self, work: Any) -> None:
        # Some backends have waited by themselves, and return nothing.
        if work is None:
            return
        if self._on_gpu:
            work.wait()
            return
        # Gloo's operations end when another rank's connections close, which they do with its process. But not
        # when its host is gone, and now and then it misses the close.
        while not work.is_completed():
            aborted = self._aborted.is_set()
            try:
                work.wait(_LOOK)
            except RuntimeError:
                if aborted and not work.is_completed():
                    self._stuck = True
                    raise
        work.wait()


#: NCCL frees what a group had within a fraction of that.
_CLOSE_S = 10.0
#: How often one who waits looks whether it is to go on waiting.
_LOOK = timedelta(seconds=1)
#: Hosts of an address that is only reached from its own machine; a path has none.
_LOCAL = (None, "localhost", "127.0.0.1")


def _gloo(store: Any, rank: int, size: int, timeout: timedelta, *, local: bool) -> Any:
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    # Left to itself, gloo listens where the host's name points to.
    options._devices = [gloo.create_device(hostname="127.0.0.1") if local else gloo.create_default_device()]
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, timeout: timedelta, *, local: bool) -> Any:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return c10d.ProcessGroupNCCL(store, rank, size, options)


def _abort_when(wanted: threading.Event, gone: threading.Event, backend: Any) -> None:
    wanted.wait()
    # Unlike a shutdown it waits for no other rank: they may be gone. NCCL's waits for recorded work.
    backend.abort()
    # A backend with a stuck operation stays until the process ends.
    gone.wait()
