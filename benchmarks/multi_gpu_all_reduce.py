"""Latency of all-reduces of bfloat16 by size, and of those that one decode step needs.

Columns, in microseconds for one all-reduce: ``engine`` is the engine's own path, launched one at a time;
``captured`` is the same path in a CUDA graph, as decode steps run it; ``NCCL`` is the engine's path without
peer memory, captured too, and ``one-shot`` is PyTorch's kernel in which every rank reads all others' peer
memory. NVLink multicast stays off.

A decode step of B sequences needs two all-reduces of ``B * hidden`` numbers a layer, and one for the
embeddings.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multi_gpu_processes import Settings, answer_of, emit, reporting, start
from benchmarks.shapes import SHAPES
from engine.distributed.group import TorchGroup
from engine.graphs import make_capture

KIB = 1024
SIZES = [8 * KIB << shift for shift in range(14)]
#: All-reduces in one captured graph.
CAPTURED = 20
#: Larger ones are bound by bandwidth, where one-shot kernels read too much.
ONE_SHOT_LIMIT = 1 << 20
SHAPE = "qwen2-vl-7b"


def run(settings: Settings) -> None:
    sizes = SIZES if settings.on_gpu else SIZES[:3]
    with tempfile.TemporaryDirectory() as folder:
        args = (settings.gpus, str(folder), sizes, settings.on_gpu)
        ranks = [start(_rank, rank, *args) for rank in range(settings.gpus)]
        rows = iter(lambda: answer_of(*ranks[0]), None)
        for case, figures in rows:
            emit(case, **figures)
        for process, _ in ranks[1:]:
            process.join()


def _rank(connection: Connection, rank: int, size: int, folder: str, sizes: list[int], on_gpu: bool) -> None:
    """Measure as one of the ranks; rank 0 sends rows and at last None."""
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    report = connection.send if rank == 0 else lambda row: None
    with reporting(connection), torch.inference_mode():
        group = TorchGroup.join(
            rank=rank, size=size, address=f"file://{folder}/engine", device=device, timeout_s=300
        )
        report((f"{size} ranks", {"share memory": group.peers is not None}))
        for count in sizes:
            figures = _measure(group.all_reduce, count, size, device)
            report((f"{size} ranks, {count // KIB} KiB", figures))
        for rows in (1, 8, 64) if on_gpu else (1,):
            report(_decode_step(group.all_reduce, f"{size} ranks, engine", rows, device))
        group.close()
        if on_gpu:
            for row in _others(rank, size, folder, sizes, device):
                report(row)
        report(None)


def _measure(
    reduce: Callable[[torch.Tensor], Any], count: int, ranks: int, device: torch.device
) -> dict[str, float]:
    """Microseconds of one all-reduce of ``count`` bytes on each of ``ranks``."""
    tensor = torch.zeros(count // 2, dtype=torch.bfloat16, device=device)
    times = 10 if device.type == "cpu" else 200 if count < 1 << 22 else 40
    figures = {"engine us": _seconds(lambda: reduce(tensor), times) * 1e6}
    if (captured := _captured(lambda: reduce(tensor), CAPTURED, device)) is not None:
        figures["captured us"] = _seconds(captured, max(2, times // CAPTURED)) / CAPTURED * 1e6
    # Bytes that each rank sends, and also receives, in a ring: comparable with NVLink's rate one way.
    figures["GB/s"] = count * 2 * (ranks - 1) / ranks / min(figures.values()) / 1e3
    return figures


def _decode_step(
    reduce: Callable[[torch.Tensor], Any], name: str, rows: int, device: torch.device
) -> tuple[str, dict[str, Any]]:
    """The all-reduces of one decode step of ``rows`` sequences, in milliseconds together."""
    config = SHAPES[SHAPE].config
    count = 2 * config["num_hidden_layers"] + 1
    tensor = torch.zeros(rows, config["hidden_size"], dtype=torch.bfloat16, device=device)
    step = _captured(lambda: reduce(tensor), count, device)
    seconds = _seconds(step, 20) if step else _seconds(lambda: reduce(tensor), 10) * count
    size = tensor.nbytes / KIB
    return f"{name}: decode step of {SHAPE}, batch {rows}", {
        "all-reduces": count,
        "KiB each": size,
        "ms in all": seconds * 1e3,
    }


def _others(rank: int, size: int, folder: str, sizes: list[int], device: torch.device) -> list[Any]:
    """Rows of NCCL and of PyTorch's one-shot kernel; one that says why, if that one can't run here."""
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/torch", rank=rank, world_size=size, device_id=device
    )
    rows = _rows(dist.all_reduce, "NCCL", sizes, size, device)
    try:
        import torch.distributed._symmetric_memory as symmetric

        sizes = [count for count in sizes if count <= ONE_SHOT_LIMIT]
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        buffer = symmetric.empty(sizes[-1] // 2, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(buffer, name)
        buffer.zero_()

        def reduce(tensor: torch.Tensor) -> Any:
            return torch.ops.symm_mem.one_shot_all_reduce(buffer[: tensor.numel()], "sum", name)

        rows += _rows(reduce, "one-shot", sizes, size, device)
    except Exception as error:
        rows.append((f"{size} ranks, one-shot", {"not measured": f"{type(error).__name__}: {error}"[:200]}))
    return rows


def _rows(
    reduce: Callable[[torch.Tensor], Any], name: str, sizes: list[int], ranks: int, device: torch.device
) -> list[Any]:
    rows: list[Any] = []
    for count in sizes:
        figures = _measure(reduce, count, ranks, device)
        named = {f"{name} {key}" if key.endswith("us") else key: value for key, value in figures.items()}
        rows.append((f"{ranks} ranks, {count // KIB} KiB", named))
    return rows + [_decode_step(reduce, f"{ranks} ranks, {name}", batch, device) for batch in (1, 8, 64)]


def _captured(work: Callable[[], Any], times: int, device: torch.device) -> Callable[[], Any] | None:
    capture = make_capture(device, enforce_eager=False)

    def repeat() -> None:
        for _ in range(times):
            work()

    return None if capture is None else capture(repeat)


def _seconds(work: Callable[[], Any], times: int) -> float:
    """Seconds of one ``work`` among ``times``, after a few that are not counted."""
    for _ in range(3):
        work()
    _wait()
    begin = time.perf_counter()
    for _ in range(times):
        work()
    _wait()
    return (time.perf_counter() - begin) / times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
