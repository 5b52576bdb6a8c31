"""The work of processes in the tests of all-reduces over peer memory."""

from __future__ import annotations

import mmap
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from engine.kernels.gemv import gemv_sum_triton
from engine.kernels.peer_reduce import (
    BUFFER_BYTES,
    EMPTY,
    PROGRAMS,
    PeerBuffers,
    ReduceTile,
    peer_all_gather,
    peer_all_reduce,
)


def make_buffers(folder: Path, size: int) -> None:
    """Make files that stand for the memory of ``size`` GPUs."""
    for rank in range(size):
        np.full(BUFFER_BYTES // 2, EMPTY, np.int16).tofile(folder / str(rank))


def take_part(
    connection: Connection,
    rank: int,
    size: int,
    folder: Path,
    sums: list[tuple[torch.Tensor, ReduceTile]],
    parts: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """Take part in all-reduces, an all-gather and a GEMV as one of ``size`` ranks, and send the results.

    Args:
        sums, parts: inputs of all ranks, ``(size, ...)``.
    """
    torch.set_num_threads(1)
    mapped = []
    for step in range(size):
        with (folder / str((rank + 1 + step) % size)).open("r+b") as file:
            mapped.append(mmap.mmap(file.fileno(), BUFFER_BYTES))
    words = [torch.frombuffer(buffer, dtype=torch.int16) for buffer in mapped]
    peers = PeerBuffers(
        rank=rank,
        size=size,
        addresses=tuple(buffer.data_ptr() for buffer in words),
        halves=torch.zeros(PROGRAMS + 1, dtype=torch.int32),
        ended=torch.zeros(1, dtype=torch.int32),
    )
    results = []
    for inputs, tile in sums:
        out = inputs[rank].clone()
        peer_all_reduce(out, peers, tile)
        results.append(out)
    results.append(peer_all_gather(parts[rank], peers))
    results.append(gemv_sum_triton(parts[rank, :1], weight, None, peers))
    # No rank writes any more once all have answered.
    connection.send(results)
    connection.recv()
    connection.send(bool((words[-1] == EMPTY).all()))
