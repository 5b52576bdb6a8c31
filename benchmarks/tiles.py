"""Measures kernels with one tile after the other.

    python -m benchmarks.tiles [--only paged_decode,vision] [--json FILE]

It prints a row per problem of :mod:`benchmarks.kernels`: microseconds with the tile that the engine chooses,
then with the best of the tiles tried. Inputs are not in the L2 cache. Each kernel's ``choose_tile`` follows
these measurements.

Without a GPU this is a smoke run: the references have no tiles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import kernels_attention, kernels_linear
from benchmarks.kernels import attempt, selected
from benchmarks.kernels_timing import Case, Clock
from benchmarks.offline import versions
from engine.kernels import decode_attention, gemv, norm_gemv, paged_attention, skinny_gemm, vision_attention
from engine.kernels.launch import compiling
from engine.kernels.tile import AttentionTile

_ATTENTION = [
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
]
_GEMV = [*product((1, 2, 4, 8), (512, 1024, 2048), (4,)), (1, 256, 2), (16, 256, 4), (4, 512, 2)]
_DECODE = product((16,), (32, 64), (1, 2, 4, 8), (2, 3), (1, 2, 8))
_NORM_GEMV = [*product((1, 2, 4, 8), (4, 8), (1, 2, 4)), (1, 2, 8)]
#: Kernel to the module that chooses its tile, and the tiles to try.
TUNED: dict[str, tuple[ModuleType, list[Any]]] = {
    "paged_decode": (decode_attention, [AttentionTile(*sizes) for sizes in _DECODE]),
    "paged_prefill": (paged_attention, [AttentionTile(*sizes) for sizes in _ATTENTION]),
    "vision": (vision_attention, [AttentionTile(*sizes) for sizes in _ATTENTION]),
    "gemv": (gemv, [gemv.GemvTile(*sizes) for sizes in _GEMV]),
    "skinny_gemm": (
        skinny_gemm,
        [skinny_gemm.SkinnyTile(*sizes) for sizes in product((64, 128), (4, 8), (3, 4, 5), (1,))],
    ),
    "norm_gemv": (norm_gemv, [norm_gemv.NormGemvTile(*sizes) for sizes in _NORM_GEMV]),
}


@contextmanager
def tiled(module: ModuleType, tile: Any) -> Iterator[None]:
    """Make the kernel of ``module`` use ``tile`` for every problem."""
    chosen = module.choose_tile
    module.choose_tile = lambda *_, **__: tile
    try:
        yield
    finally:
        module.choose_tile = chosen


def tuned_cases(device: torch.device, tiny: bool) -> list[Case]:
    """Return the problems whose kernel is in ``TUNED``."""
    cases = [*kernels_attention.cases(device, tiny), *kernels_linear.cases(device, tiny)]
    # The tiles tried for skinny GEMMs do not split inputs, which layers without a gate need.
    return [c for c in cases if c.kernel in TUNED and (c.kernel != "skinny_gemm" or "gated" in c.label)]


def measure(case: Case, clock: Clock) -> dict[str, Any]:
    """Return microseconds by tile, best first; an error text for a tile that does not fit the GPU."""
    module, tiles = TUNED[case.kernel]
    problem = case.build()
    if torch.cuda.is_available():
        # Compiled one after the other they would take most of the time.
        with compiling():
            for tile in tiles:
                with tiled(module, tile):
                    problem.run()
    chosen = attempt(problem.run, clock)
    times: dict[str, float | str] = {}
    for tile in tiles:
        with tiled(module, tile):
            times[",".join(map(str, astuple(tile)))] = attempt(problem.run, clock)
    ordered = sorted(times.items(), key=lambda item: item[1] if isinstance(item[1], float) else float("inf"))
    return {"kernel": case.kernel, "case": case.label, "chosen": chosen, "tiles": dict(ordered)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help=f"kernels, comma-separated: {', '.join(TUNED)}; all by default")
    parser.add_argument(
        "--seconds", type=float, default=0.01, help="seconds to measure each tile for, on a GPU"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    only = selected(parser, options.only, set(TUNED))
    results: dict[str, Any] = {**versions(), "smoke run": device.type == "cpu", "rows": []}
    torch.manual_seed(0)
    clock = Clock(device, options.seconds)
    for case in tuned_cases(device, results["smoke run"]):
        if case.kernel not in only:
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
