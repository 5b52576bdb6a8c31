"""Rows of tensors from disk, read ahead of who takes them in."""

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
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a tensor, and where they lie.

    Attributes:
        name: the tensor's name.
        first: the first row.
        count: how many.
        tail: the shape of a row.
        dtype: of the numbers.
        file, offset: the file, and the byte of it where the first row begins.
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
        """Rows ``first`` to ``end``, the one after the last, of a tensor with at least one dimension."""
        whole = cls(name, 0, info.shape[0], info.shape[1:], _DTYPES[info.dtype], info.file, info.begin)
        return replace(whole, first=first, count=end - first, offset=info.begin + first * whole.row_bytes)

    @property
    def row_bytes(self) -> int:
        size = self.dtype.itemsize
        for side in self.tail:
            size *= side
        return size

    def pieces(self, limit: int) -> Iterator[Rows]:
        """These rows in parts of at most ``limit`` bytes, or of one row where that is more."""
        step = max(1, limit // max(1, self.row_bytes))
        for start in range(0, self.count, step):
            yield replace(
                self,
                first=self.first + start,
                count=min(step, self.count - start),
                offset=self.offset + start * self.row_bytes,
            )


class _Buffer:
    """Memory that one piece after the other is read into."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._taken_in: torch.cuda.Event | None = None

    def fill(self, piece: Rows, descriptor: int) -> torch.Tensor:
        """The rows of ``piece``, valid until the next call."""
        if self._taken_in is not None:
            self._taken_in.synchronize()
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
        """What was enqueued on the current stream so far is the last that looks at the rows."""
        if self._pinned:
            self._taken_in = torch.cuda.Event()
            self._taken_in.record()


def read_rows(wanted: Iterable[Rows], *, pinned: bool) -> Iterator[tuple[Rows, torch.Tensor]]:
    """The rows asked for, in order and in pieces ``(count, *tail)``, each valid until the next is asked for.

    Several threads read ahead, into few buffers: memory stays small, and the disk is never idle while rows
    are taken in.

    Args:
        pinned: into page-locked memory, which a GPU copies from without waiting. Copies that were enqueued on
            the current stream before the next piece is asked for may still be under way then.

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
