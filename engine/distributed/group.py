"""The tensor-parallel group: passed as an argument to its users, never global."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from engine.distributed.peer_memory import PeerMemory
from engine.kernels.device import use_triton
from engine.kernels.peer_reduce import (
    PeerBuffers,
    peer_all_gather,
    peer_all_reduce,
    supports,
    supports_gather,
)


class TensorParallelGroup(Protocol):
    """Ranks that share one model. Every rank makes the same calls in the same order.

    Attributes:
        peers: the ranks' memory, if all of them can write to it; for small tensors only.
    """

    rank: int
    size: int

    @property
    def peers(self) -> PeerBuffers | None: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns ``tensor``."""

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate every rank's equally shaped ``tensor`` along ``dim``, in rank order."""

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite ``tensor`` with that of rank ``source``; returns it."""

    def abort(self) -> None:
        """Leave the group without the other ranks: operations that still wait for them fail or end.

        Returns at once; may be called from any thread, and repeatedly.
        """

    def close(self) -> None:
        """Abort, and return when the backend is freed.

        CUDA graphs that captured its operations must be freed before. The rendezvous file or store must still
        exist.
        """


class SingleProcessGroup:
    """A group of one rank: no operation does anything."""

    rank = 0
    size = 1
    peers = None

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

    It is independent of PyTorch's global group: a process may join several groups, also at the same time.
    """

    def __init__(self, backend: Any, device: torch.device, memory: PeerMemory | None = None) -> None:
        self._backend: Any = backend
        self._memory = memory
        self.rank: int = backend.rank()
        self.size: int = backend.size()
        self._on_gpu = device.type == "cuda"
        self._aborted, self._gone, self._stuck = threading.Event(), threading.Event(), False
        # Started now, because an interpreter that is shutting down starts no threads. The thread's reference
        # also keeps the garbage collector from freeing the backend before the CUDA graphs that captured its
        # operations: it would wait for them forever.
        self._aborting = threading.Thread(
            target=_abort_when, args=(self._aborted, self._gone, backend), name="group-abort", daemon=True
        )
        self._aborting.start()

    @classmethod
    def join(
        cls, *, rank: int, size: int, address: str, device: torch.device, timeout_s: float = 300.0
    ) -> TorchGroup:
        """Join the group; returns when all ranks have joined.

        Args:
            address: of the rendezvous: ``tcp://host:port`` on which rank 0 listens, or ``file:///path`` of a
                file that doesn't exist yet, for ranks of one host.
            device: device of the group's tensors; a GPU selects NCCL, a CPU gloo.
            timeout_s: seconds to wait for the other ranks, here and in every later operation.
        """
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(dist.rendezvous(address, rank, size, timeout=timeout))
        store.set_timeout(timeout)
        make = _nccl if device.type == "cuda" else _gloo
        backend = make(store, rank, size, timeout, own_address(urlsplit(address).hostname))
        backend._set_sequence_number_for_group()
        if device.type == "cuda":
            backend.eager_connect_single_device(device)
        return cls(backend, device, _peer_memory(store, rank, size, address, device))

    @property
    def peers(self) -> PeerBuffers | None:
        return None if self._memory is None else self._memory.buffers

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._memory is not None and supports(tensor):
            peer_all_reduce(tensor, self._memory.buffers)
            return tensor
        options = c10d.AllreduceOptions()
        options.asyncOp = False
        self._wait(self._backend.allreduce([tensor], options))
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        if self._memory is not None and dim == -1 and supports_gather(tensor, self.size):
            return peer_all_gather(tensor, self._memory.buffers)
        rows = torch.empty(
            self.size * tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device
        )
        # Backends treat empty tensors differently.
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
        if self._memory is not None:
            self._memory.end()
        self._aborted.set()

    def close(self) -> None:
        self.abort()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if not self._stuck:
            self._gone.set()
            self._aborting.join(_CLOSE_S)
        # Dropping the last reference joins the backend's threads, unless an operation is stuck.
        self._backend = None

    def _wait(self, work: Any) -> None:
        # Some backends wait by themselves and return None.
        if work is None:
            return
        if self._on_gpu:
            work.wait()
            return
        # A gloo operation ends when another rank's connections close, as they do when its process ends. They
        # stay open if that rank's host is lost, and sometimes gloo misses the close.
        while not work.is_completed():
            aborted = self._aborted.is_set()
            try:
                work.wait(_ABORT_POLL)
            except RuntimeError:
                if aborted and not work.is_completed():
                    self._stuck = True
                    raise
        work.wait()


#: Seconds to wait for the backend to be freed; NCCL takes a fraction of this.
_CLOSE_S = 10.0
#: Poll interval for the abort flag.
_ABORT_POLL = timedelta(seconds=1)


def own_address(host: str | None) -> str:
    """The address of this machine by which ``host`` reaches it; that of the loopback for None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: it only asks for the route. The port doesn't matter.
        probe.connect((host or "127.0.0.1", 9))
        return probe.getsockname()[0]


def _peer_memory(store: Any, rank: int, size: int, address: str, device: torch.device) -> PeerMemory | None:
    """Share memory among GPUs of one host, whose ranks meet in a folder."""
    place = urlsplit(address)
    if place.scheme != "file" or not use_triton(torch.empty(0, device=device)):
        return None
    return PeerMemory.share(store, rank=rank, size=size, meeting=Path(place.path), device=device)


def _gloo(store: Any, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    # By default gloo listens on the address that the host's name resolves to.
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return c10d.ProcessGroupNCCL(store, rank, size, options)


def _abort_when(aborted: threading.Event, gone: threading.Event, backend: Any) -> None:
    aborted.wait()
    # A shutdown would wait for the other ranks, which may be gone. NCCL's abort waits for captured graphs.
    backend.abort()
    # A backend with a stuck operation stays until the process ends.
    gone.wait()
