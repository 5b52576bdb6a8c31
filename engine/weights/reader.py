"""Reads rows of tensors from disk, ahead of the caller."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.checkpoint.folder import TensorInfo
from engine.errors import CheckpointError

_CHUNK = 32 << 20
_BUFFERS = 6
_THREADS = 4
#: By the names of safetensors.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a tensor in a file.

    Attributes:
        name: the tensor's name.
        first: index of the first row.
        count: number of rows.
        tail: shape of a row.
        dtype: of the numbers.
        file: the file.
        offset: offset of the first row in the file, in bytes.
    """

    name: str
    first: int
    count: int
    tail: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int

    @classmethod
    def of(cls, name: str, info: TensorInfo, first: int, end: int) -> Rows:
        """Rows ``first`` to ``end - 1`` of a tensor with at least one dimension."""
        whole = cls(name, 0, info.shape[0], info.shape[1:], DTYPES[info.dtype], info.file, info.begin)
        return replace(whole, first=first, count=end - first, offset=info.begin + first * whole.row_bytes)

    @property
    def row_bytes(self) -> int:
        size = self.dtype.itemsize
        for side in self.tail:
            size *= side
        return size

    def pieces(self, limit: int) -> Iterator[Rows]:
        """These rows in parts of at most ``limit`` bytes; of one row if a row is larger."""
        step = max(1, limit // max(1, self.row_bytes))
        for start in range(0, self.count, step):
            yield replace(
                self,
                first=self.first + start,
                count=min(step, self.count - start),
                offset=self.offset + start * self.row_bytes,
            )


class _Buffer:
    """Memory for one piece at a time."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._read: torch.cuda.Event | None = None

    def fill(self, piece: Rows, descriptor: int) -> torch.Tensor:
        """Read ``piece``: its rows, valid until the next call.

        Raises:
            CheckpointError: the file ends too early or can't be read.
        """
        if self._read is not None:
            self._read.synchronize()
        size = piece.count * piece.row_bytes
        if len(self._memory) < size:
            self._memory = torch.empty(max(size, _CHUNK), dtype=torch.uint8, pin_memory=self._pinned)
        view = memoryview(self._memory.numpy())[:size]  # type: ignore[arg-type]
        done = 0
        try:
            while done < size:
                read = os.preadv(descriptor, [view[done:]], piece.offset + done)
                if read == 0:
                    raise CheckpointError(f"{piece.file} can't be read: it ends within tensor {piece.name}")
                done += read
        except OSError as error:
            raise CheckpointError(f"{piece.file} can't be read: {error}") from error
        return self._memory[:size].view(piece.dtype).view(piece.count, *piece.tail)

    def release(self) -> None:
        """Note that the work enqueued on the current stream so far is the last that reads the rows."""
        if self._pinned:
            self._read = torch.cuda.Event()
            self._read.record()


def read_rows(wanted: Iterable[Rows], *, pinned: bool) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Read the rows in order, in pieces ``(count, *tail)`` that are valid until the next one is requested.

    Several threads read ahead into a few buffers: memory stays small, and the disk is busy while the caller
    copies rows.

    Args:
        wanted: the rows.
        pinned: whether to read into page-locked memory, from which copies to a GPU are asynchronous. Copies
            enqueued on the current stream before the next piece is requested may still be running then.

    Raises:
        CheckpointError: naming the file that can't be read.
    """
    pieces = (piece for rows in wanted for piece in rows.pieces(_CHUNK))
    free = [_Buffer(pinned) for _ in range(_BUFFERS)]
    ahead: deque[tuple[Rows, _Buffer, Future[torch.Tensor]]] = deque()
    descriptors: dict[Path, int] = {}
    with ExitStack() as stack, ThreadPoolExecutor(_THREADS, "read-weights") as pool:
        try:
            while True:
                while free and (piece := next(pieces, None)) is not None:
                    if piece.file not in descriptors:
                        descriptors[piece.file] = os.open(piece.file, os.O_RDONLY)
                        stack.callback(os.close, descriptors[piece.file])
                    buffer = free.pop()
                    ahead.append((piece, buffer, pool.submit(buffer.fill, piece, descriptors[piece.file])))
                if not ahead:
                    return
                piece, buffer, filled = ahead.popleft()
                yield piece, filled.result()
                buffer.release()
                free.append(buffer)
        finally:
            pool.shutdown(cancel_futures=True)
