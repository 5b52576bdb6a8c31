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
from typing import Any

# Read when torch and Triton are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from tests.engine.families.drawn import agreement, report
from tests.engine.families.drawn.families import FAMILIES
from tests.engine.families.drawn.modes import MODES
from tests.engine.families.drawn.run import PROMPTS, Case, Result, lost, run_and_simplify
from tests.engine.families.drawn.workers import results


def main() -> int:
    """Run the cases that the command line asks for; 1 if any differs."""
    options = _options()
    started = time.monotonic()
    exact = options.device == "cpu" and options.dtype == "float32"
    table = report.table if exact else agreement.table
    if options.table is not None:
        records = report.read(options.table)
    else:
        records = list(_compared(options) if exact else _measured(options))
    print(table(sorted(records, key=lambda one: list(FAMILIES).index(one["family"]))))
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{time.monotonic() - started:.0f} s; {versions}")
    return int(any(one["status"] in ("different", "crashed") for one in records))


def _compared(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of all cases in float32 on a CPU, where outputs are equal."""
    one = partial(run_and_simplify, as_is=options.as_is)
    for result, simple in results(one, _lost, _cases(options), options.jobs, options.seconds):
        if options.verbose:
            print(f"{result.status} {result.case.family.name} {result.case.seed}", flush=True)
        if result.status == "different":
            print(report.difference(result, simple), flush=True)
        yield _kept(options, report.record(result))


def _lost(case: Case) -> tuple[Result, Result]:
    result = lost(case)
    return result, result


def _measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of all cases in another dtype or on a GPU, where outputs are near."""
    for found in results(agreement.agree, agreement.lost, _cases(options), options.jobs, options.seconds):
        record = agreement.record(found)
        if options.verbose:
            print(agreement.table([record]), flush=True)
        yield _kept(options, record)


def _kept(options: argparse.Namespace, record: dict[str, Any]) -> dict[str, Any]:
    """``record``, which stands in the file of ``--record`` now."""
    if options.record is not None:
        with options.record.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return record


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    engine = {"device": options.device, "dtype": options.dtype}
    done: set[tuple[str, int]] = set()
    if options.resume and options.record is not None and options.record.exists():
        done = {(one["family"], one["seed"]) for one in report.read([options.record])}
    for seed in range(options.seed, options.seed + options.n):
        for name in options.family:
            if (name, seed) in done:
                continue
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
    parser.add_argument("--resume", action="store_true", help="leave out the cases that the record has")
    parser.add_argument("--table", nargs="+", type=Path, help="run nothing; print the table of these records")
    parser.add_argument("--as-is", action="store_true", help="don't look for simpler cases")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
