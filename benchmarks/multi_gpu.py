"""What several GPUs of one host bring: all-reduces, tensor parallelism, and encoders on GPUs of their own.

    python -m benchmarks.multi_gpu [--parts all_reduce,tensor_parallel,layouts] [--gpus N] [--seconds 520]
        [--shapes qwen2-vl-7b] [--images 1,4] [--layouts "whole,2 + 2"] [--of N] [--json FILE]

Finds the GPUs by itself and prints one table. Without GPUs, two ranks over gloo run tiny shapes in seconds.
It needs no Ray and no HTTP. Each part runs in a process of its own with a share of ``--seconds``; a part that
fails or takes too long prints its last lines, what it measured is kept, and the next part runs. A part alone
has all the seconds: ``--parts layouts`` measures more rates, so the goodputs are known more closely. It needs
about 50 s for each layout and number of images.

Parts:
    all_reduce       latency by size: the engine's all-reduce as it is launched and in a captured graph,
                     beside PyTorch's one-shot kernel over peer memory; and what a decode step needs in all.
                     See benchmarks/multi_gpu_all_reduce.py.
    tensor_parallel  Qwen2-VL-7B, Qwen2-VL-2B and LLaVA-1.5-7B on 1, 2, 4 ranks: how many greedy tokens are
                     the single GPU's, and the 7B's speed as a ratio to it.
                     See benchmarks/multi_gpu_ranks.py.
    layouts          goodput of the same GPUs as whole replicas and with encoders apart.
                     See benchmarks/multi_gpu_layouts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from benchmarks import multi_gpu_all_reduce, multi_gpu_layouts, multi_gpu_ranks
from benchmarks.multi_gpu_processes import ROW, Settings
from benchmarks.orphans import end_with_this_process

#: What each part runs, and its share of the seconds.
PARTS = {
    "all_reduce": (multi_gpu_all_reduce.run, 1),
    "tensor_parallel": (multi_gpu_ranks.run, 5),
    "layouts": (multi_gpu_layouts.run, 5),
}
#: Seconds that a part may take beyond those that it was told: to start and to end its processes.
GRACE_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--gpus", type=int, help="how many to use; all by default, two ranks without any")
    parser.add_argument("--seconds", type=float, default=520.0, help="most that all parts take together")
    parser.add_argument("--shapes", type=_names, help="that the layouts serve")
    parser.add_argument("--images", type=_numbers, help="of a request to the layouts, comma-separated")
    parser.add_argument("--layouts", type=_names, help="those to measure: whole, 1 + 3, 2 + 2, shared")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="most in one step of the layouts")
    parser.add_argument("--of", type=int, help="run a part of a layout of so many GPUs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", action="store_true", help="run the one part in this process")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"--parts: there is no {sorted(unknown)[0]!r}; known are {', '.join(PARTS)}")
    on_gpu = torch.cuda.is_available()
    gpus = options.gpus or (torch.cuda.device_count() if on_gpu else 2)
    if gpus < 2 and options.of is None:
        raise SystemExit("there is one GPU here; this benchmark compares several")
    chosen = (options.shapes, options.images, options.layouts, options.batched_tokens, options.of)
    settings = Settings(gpus, on_gpu, options.seconds, *chosen)
    if options.alone:
        PARTS[parts[0]][0](settings)
        return
    rows = run_parts(parts, settings)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if failed := [row["part"] for row in rows if "error" in row]:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",")]


def _numbers(given: str) -> list[int]:
    return [int(number) for number in given.split(",")]


def run_parts(parts: list[str], settings: Settings) -> list[dict[str, Any]]:
    """Run parts one after the other; seconds that one leaves are the next one's."""
    end, rows = time.monotonic() + settings.seconds, []
    for number, name in enumerate(parts):
        shares = [PARTS[left][1] for left in parts[number:]]
        limit = (end - time.monotonic()) * shares[0] / sum(shares)
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        rows += run_part(name, settings, limit)
    return rows


def run_part(name: str, settings: Settings, limit: float) -> list[dict[str, Any]]:
    """Run one part in a process of its own for at most ``limit`` seconds, those of ``settings`` apart.

    Returns:
        What it measured; if it failed, a row with ``error`` as well.
    """
    told = max(1.0, limit - GRACE_S)
    command = [sys.executable, "-m", "benchmarks.multi_gpu", "--alone", "--parts", name]
    command += ["--gpus", str(settings.gpus), "--seconds", str(told)]
    for option in ("shapes", "images", "layouts"):
        if given := getattr(settings, option):
            command += [f"--{option}", ",".join(map(str, given))]
    command += ["--batched-tokens", str(settings.batched_tokens)]
    if settings.of is not None:
        command += ["--of", str(settings.of)]
    end_with_this_process()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    late = threading.Event()

    def end_late() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(limit, end_late)
    timer.start()
    rows: list[dict[str, Any]] = []
    tail: deque[str] = deque(maxlen=25)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ROW):
                rows.append({"part": name, **json.loads(line.removeprefix(ROW))})
                print(_line(rows[-1]), flush=True)
            else:
                tail.append(line)
        process.wait()
    finally:
        timer.cancel()
        _kill(process)
    if process.returncode:
        print("".join(tail), flush=True)
        reason = f"took more than {limit:.0f} s" if late.is_set() else f"exit status {process.returncode}"
        rows.append({"part": name, "case": "failed", "error": reason})
    return rows


def _kill(process: subprocess.Popen[str]) -> None:
    """End a part with all processes of its session. Ranks of an engine end when it does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _line(row: dict[str, Any]) -> str:
    figures = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {'-' if value is None else value}"
        for name, value in row.items()
        if name not in ("part", "case")
    ]
    return f"{row['part']:16} {row['case']:44} {'   '.join(figures)}"


def print_table(rows: list[dict[str, Any]]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n== {device}, torch {torch.__version__}")
    print("\n".join(_line(row) for row in rows), flush=True)


if __name__ == "__main__":
    main()
