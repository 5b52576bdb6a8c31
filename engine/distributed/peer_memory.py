"""Memory of GPUs of one host that all ranks of a group can write to.

Each rank allocates a buffer with the virtual memory calls of CUDA's driver, sends its file descriptor to the
other ranks over Unix sockets, and maps theirs. Such memory stays as long as one process has it mapped: a rank
that dies takes nothing from under the kernels of the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch

from engine.kernels.peer_reduce import BUFFER_BYTES, EMPTY, PROGRAMS, PeerBuffers

logger = logging.getLogger(__name__)

#: Seconds to wait for another rank's file descriptor, once it listens.
_EXCHANGE_S = 30.0


class PeerMemory:
    """This rank's buffer and those of the other ranks, mapped into this process.

    Attributes:
        buffers: what kernels need of it.
    """

    def __init__(self, rank: int, mapped: list[_Mapping], device: torch.device) -> None:
        self._mapped = mapped
        size = len(mapped)
        # Pinned, so a kernel that waits can read it.
        self._ended = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.buffers = PeerBuffers(
            rank=rank,
            size=size,
            addresses=tuple(mapped[(rank + 1 + step) % size].address for step in range(size)),
            halves=torch.zeros(PROGRAMS + 1, dtype=torch.int32, device=device),
            ended=self._ended,
        )

    @classmethod
    def share(
        cls, store: Any, *, rank: int, size: int, meeting: Path, device: torch.device
    ) -> PeerMemory | None:
        """Allocate this rank's buffer and exchange it with the other ranks, which make the same call.

        Args:
            store: the group's, to agree with the other ranks.
            meeting: name of the sockets at which the ranks meet, each with a dot and its rank behind it. The
                folder exists, and only the group's user may enter it.

        Returns:
            None on all ranks, if the GPUs can't reach each other's memory or the driver can't share it.
        """
        mapped: dict[int, _Mapping] = {}
        with torch.cuda.device(device), contextlib.ExitStack() as stack:
            failed = ""
            try:
                mapped[rank], descriptor = _Mapping.allocate(device)
                stack.callback(os.close, descriptor)
                listener = stack.enter_context(_listen(meeting, rank, size))
                stack.callback(os.unlink, _socket_path(meeting, rank))
            except (_DriverError, OSError) as error:
                failed = repr(error)
            agreed = _all_agree(store, "shared", rank, size, failed)
            if agreed:
                try:
                    _send_descriptor(descriptor, meeting, rank, size)
                    for other, given in _receive_descriptors(listener, size - 1).items():
                        stack.callback(os.close, given)
                        mapped[other] = _Mapping.of(given, device)
                except (_DriverError, OSError) as error:
                    failed = repr(error)
                agreed = _all_agree(store, "mapped", rank, size, failed)
            if agreed:
                return cls(rank, [mapped[other] for other in range(size)], device)
            for mapping in mapped.values():
                mapping.free()
            return None

    def end(self) -> None:
        """End the waits of kernels, now and later; their results are wrong. May be called from any thread."""
        self._ended[0] = 1

    def close(self) -> None:
        """Free the memory. No kernel and no captured graph may use it any more."""
        # If the device computes no more, the memory goes with the process.
        with contextlib.suppress(RuntimeError, _DriverError):
            torch.cuda.synchronize(self.buffers.halves.device)
            for mapping in self._mapped:
                mapping.free()
        self._mapped = []


def _socket_path(meeting: Path, rank: int) -> str:
    return f"{meeting}.{rank}"


def _listen(meeting: Path, rank: int, size: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_socket_path(meeting, rank))
        listener.listen(size)
        listener.settimeout(_EXCHANGE_S)
    except BaseException:
        listener.close()
        raise
    return listener


def _all_agree(store: Any, what: str, rank: int, size: int, failed: str) -> bool:
    """Tell the other ranks whether this one has failed, and return whether none has."""
    store.set(f"peer memory/{what}/{rank}", failed or "ok")
    answers = [store.get(f"peer memory/{what}/{other}").decode() for other in range(size)]
    wrong = [answer for answer in answers if answer != "ok"]
    if wrong and rank == 0:
        logger.warning("GPUs don't share memory, so small all-reduces take longer: %s", wrong[0])
    return not wrong


def _send_descriptor(descriptor: int, meeting: Path, rank: int, size: int) -> None:
    """Send a file descriptor to all other ranks, which listen."""
    for other in range(size):
        if other != rank:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_EXCHANGE_S)
                connection.connect(_socket_path(meeting, other))
                socket.send_fds(connection, [bytes([rank])], [descriptor])


def _receive_descriptors(listener: socket.socket, count: int) -> dict[int, int]:
    """Receive ``count`` file descriptors, by rank."""
    found = {}
    for _ in range(count):
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(_EXCHANGE_S)
            message, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            found[message[0]] = descriptors[0]
    return found


class _DriverError(Exception):
    """A call of CUDA's driver has failed."""


class _Location(ctypes.Structure):
    """``CUmemLocation``: of memory, or of who accesses it."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


# Values of enums in cuda.h.
_PINNED, _ON_DEVICE, _FILE_DESCRIPTOR, _RECOMMENDED, _READ_WRITE = 1, 1, 1, 1, 3


class _Mapping:
    """A buffer on some GPU, mapped into this process for use by ``device``.

    Args:
        handle: of the memory, which stays as long as it is mapped; freed here.

    Attributes:
        address: where it is mapped.
    """

    def __init__(self, handle: ctypes.c_uint64, device: torch.device) -> None:
        self._size = ctypes.c_size_t(_buffer_bytes(device))
        none, start = ctypes.c_size_t(0), ctypes.c_uint64()
        access = _Access(_Location(_ON_DEVICE, device.index), _READ_WRITE)
        try:
            _call("cuMemAddressReserve", ctypes.byref(start), self._size, none, _u64(0), _u64(0))
            _call("cuMemMap", start, self._size, none, handle, _u64(0))
            _call("cuMemSetAccess", start, self._size, ctypes.byref(access), ctypes.c_size_t(1))
        finally:
            _call("cuMemRelease", handle)
        self._start = start
        self.address = start.value

    @classmethod
    def allocate(cls, device: torch.device) -> tuple[_Mapping, int]:
        """Allocate a buffer full of :data:`EMPTY`; also returns a file descriptor by which others map it."""
        handle, descriptor = ctypes.c_uint64(), ctypes.c_int()
        size, properties = ctypes.c_size_t(_buffer_bytes(device)), _properties(device)
        _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), _u64(0))
        kind = ctypes.c_int(_FILE_DESCRIPTOR)
        _call("cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, kind, _u64(0))
        own = cls(handle, device)
        words = ctypes.c_size_t(size.value // 2)
        _call("cuMemsetD16_v2", own._start, ctypes.c_ushort(EMPTY & 0xFFFF), words)
        torch.cuda.synchronize(device)
        return own, descriptor.value

    @classmethod
    def of(cls, descriptor: int, device: torch.device) -> _Mapping:
        """Map the buffer of another process."""
        handle = ctypes.c_uint64()
        kind = ctypes.c_int(_FILE_DESCRIPTOR)
        _call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(descriptor), kind)
        return cls(handle, device)

    def free(self) -> None:
        _call("cuMemUnmap", self._start, self._size)
        _call("cuMemAddressFree", self._start, self._size)


def _properties(device: torch.device) -> _Properties:
    return _Properties(_PINNED, _FILE_DESCRIPTOR, _Location(_ON_DEVICE, device.index))


def _buffer_bytes(device: torch.device) -> int:
    """The bytes of a buffer, a multiple of what the driver allocates."""
    step, properties = ctypes.c_size_t(), _properties(device)
    which = ctypes.c_int(_RECOMMENDED)
    _call("cuMemGetAllocationGranularity", ctypes.byref(step), ctypes.byref(properties), which)
    return -(-BUFFER_BYTES // step.value) * step.value


_u64 = ctypes.c_uint64


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    """Call a function of CUDA's driver.

    Raises:
        _DriverError: it has failed.
    """
    status = getattr(_driver(), name)(*arguments)
    if status:
        raise _DriverError(f"{name} failed with status {status}")
