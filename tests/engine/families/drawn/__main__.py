"""Draws cases and compares the engine with Transformers: ``python -m tests.engine.families.drawn``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

# Read when torch and Triton are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from tests.engine.families.drawn import report
from tests.engine.families.drawn.agreement import agree, table
from tests.engine.families.drawn.families import FAMILIES
from tests.engine.families.drawn.modes import MODES
from tests.engine.families.drawn.run import PROMPTS, Case, run_and_simplify
from tests.engine.families.drawn.workers import results


def main() -> int:
    """Run the cases that the command line asks for; 1 if any differs."""
    options = _options()
    started = time.monotonic()
    exact = options.device == "cpu" and options.dtype == "float32"
    failed = _compare(options) if exact else _measure(options)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{time.monotonic() - started:.0f} s; {versions}")
    return int(failed)


def _compare(options: argparse.Namespace) -> bool:
    """All cases in float32 on a CPU, where outputs are equal; whether any differs."""
    found = []
    one = partial(run_and_simplify, as_is=options.as_is)
    for result, simple in results(one, _cases(options), options.jobs, options.seconds):
        found.append(result)
        if options.verbose:
            print(f"{result.status} {result.case.family.name} {result.case.seed}", flush=True)
        if result.status == "different":
            print(report.difference(result, simple), flush=True)
        if options.record is not None:
            with options.record.open("a") as file:
                file.write(json.dumps(report.record(result)) + "\n")
    print(report.table(found))
    return any(result.status == "different" for result in found)


def _measure(options: argparse.Namespace) -> bool:
    """All cases in another dtype or on a GPU, where outputs are near; whether any could not be computed."""
    found = []
    for one in results(agree, _cases(options), options.jobs, options.seconds):
        found.append(one)
        if options.verbose:
            print(table(found[-1:]), flush=True)
    print(table(sorted(found, key=lambda one: list(FAMILIES).index(one.case.family.name))))
    return any(one.crashed for one in found)


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    engine = {"device": options.device, "dtype": options.dtype}
    for seed in range(options.seed, options.seed + options.n):
        for name in options.family:
            modes = [mode for mode in options.modes if mode in MODES]
            without, prompts = tuple(options.without), tuple(options.prompts or range(options.each))
            yield Case(FAMILIES[name], seed, tuple(modes), without, prompts, engine)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.engine.families.drawn", description=__doc__)
    parser.add_argument("-n", type=int, default=10, help="cases per family")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--modes", nargs="*", choices=["alone", *MODES], default=list(MODES))
    parser.add_argument("--each", type=int, default=PROMPTS, help="prompts per checkpoint")
    parser.add_argument("--prompts", nargs="+", type=int, help="numbers of the prompts, in place of --each")
    parser.add_argument("--without", nargs="+", default=[], help="variations to switch off")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run cases")
    parser.add_argument("--seconds", type=float, help="begin no case after so long")
    parser.add_argument("--record", type=Path, help="file to which each case's result is added, in JSON")
    parser.add_argument("--as-is", action="store_true", help="don't look for simpler cases")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
