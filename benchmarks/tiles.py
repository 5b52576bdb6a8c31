"""Kernels whose tiles are a choice, with one tile after the other.

    python -m benchmarks.tiles [--only paged_decode,vision] [--json FILE]

A row per problem of :mod:`benchmarks.kernels`: microseconds with the tile that the engine takes, then with
the best of those tried. Inputs are cold in L2. What is measured here goes into each kernel's ``tiling``.

Without a GPU this is a smoke run: there are no tiles in the references.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import kernels_attention, kernels_linear
from benchmarks.kernels import attempt, selected
from benchmarks.kernels_timing import Case, Clock
from benchmarks.offline import versions
from engine.kernels import decode_attention, few_rows, linear, norm_linear, paged_attention, vision_attention
from engine.kernels.launch import compiling

_ATTENTION = [
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
]
_GEMV = [*product((1, 2, 4, 8), (512, 1024, 2048), (4,)), (1, 256, 2), (16, 256, 4), (4, 512, 2)]
#: Kernel to the module that decides its tile, and the tiles to try.
TUNED: dict[str, tuple[ModuleType, list[tuple[int, ...]]]] = {
    "paged_decode": (decode_attention, [(16, *rest) for rest in product((32, 64, 128), (1, 2, 4), (2, 3))]),
    "paged_prefill": (paged_attention, _ATTENTION),
    "vision": (vision_attention, _ATTENTION),
    "linear": (linear, _GEMV),
    "few_rows": (few_rows, list(product((64, 128), (4, 8), (3, 4, 5), (1,)))),
    "norm_linear": (norm_linear, [*product((1, 2, 4, 8), (4, 8), (1, 2, 4)), (1, 2, 8)]),
}


@contextmanager
def tiled(module: ModuleType, tile: tuple[int, ...]) -> Iterator[None]:
    """Let the kernels of ``module`` take ``tile`` whatever the problem."""
    chosen = module.tiling
    module.tiling = lambda *_, **__: module.Tiling(*tile)
    try:
        yield
    finally:
        module.tiling = chosen


def tuned_cases(device: torch.device, tiny: bool) -> list[Case]:
    """Problems that go through a kernel with a tile."""
    cases = [*kernels_attention.cases(device, tiny), *kernels_linear.cases(device, tiny)]
    # With more rows the product is another kernel's, or torch's.
    return [c for c in cases if c.kernel in TUNED and (c.kernel != "linear" or c.label.endswith("batch 1"))]


def measure(case: Case, clock: Clock) -> dict[str, Any]:
    """Microseconds by tile, best first; text in the place of those that don't fit the GPU."""
    module, tiles = TUNED[case.kernel]
    problem = case.build()
    if torch.cuda.is_available():
        # One after the other they would take most of the time.
        with compiling():
            for tile in tiles:
                with tiled(module, tile):
                    problem.run()
    chosen = attempt(problem.run, clock)
    times: dict[str, float | str] = {}
    for tile in tiles:
        with tiled(module, tile):
            times[",".join(map(str, tile))] = attempt(problem.run, clock)
    ordered = sorted(times.items(), key=lambda item: item[1] if isinstance(item[1], float) else float("inf"))
    return {"kernel": case.kernel, "case": case.label, "chosen": chosen, "tiles": dict(ordered)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help=f"of {', '.join(TUNED)}; all by default")
    parser.add_argument("--seconds", type=float, default=0.01, help="of measuring for each tile on a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = selected(parser, options.only, set(TUNED))
    results: dict[str, Any] = {**versions(), "smoke run": device.type == "cpu", "rows": []}
    torch.manual_seed(0)
    clock = Clock(device, options.seconds)
    for case in tuned_cases(device, results["smoke run"]):
        if case.kernel not in wanted:
            continue
        row = measure(case, clock)
        results["rows"].append(row)
        best = [f"{tile} {time:.1f}" for tile, time in row["tiles"].items() if isinstance(time, float)][:4]
        chosen = f"{row['chosen']:.1f}" if isinstance(row["chosen"], float) else row["chosen"]
        print(f"{row['kernel']:14} {row['case']:36} {chosen:>8}  best: {'  '.join(best)}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
