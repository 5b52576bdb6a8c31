"""Draws cases and compares the engine with Transformers: ``python -m tests.engine.families.drawn``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator

# Read when torch and Triton are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import transformers

from tests.engine.families.drawn import report
from tests.engine.families.drawn.agreement import agree, table
from tests.engine.families.drawn.families import FAMILIES
from tests.engine.families.drawn.modes import MODES
from tests.engine.families.drawn.run import PROMPTS, Case, run, simplest


def main() -> int:
    """Run the cases that the command line asks for; 1 if any differs."""
    options = _options()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("engine").setLevel(logging.ERROR)
    started = time.monotonic()
    exact = options.device == "cpu" and options.dtype == "float32"
    failed = _compare(options) if exact else _measure(options)
    print(f"{time.monotonic() - started:.0f} s; transformers {transformers.__version__}")
    return int(failed)


def _compare(options: argparse.Namespace) -> bool:
    """All cases in float32 on a CPU, where outputs are equal; whether any differs."""
    results = []
    for case in _cases(options):
        result = run(case)
        results.append(result)
        if options.verbose:
            print(f"{result.status} {case.family.name} {case.seed}: {', '.join(result.varied)}", flush=True)
        if result.status == "different":
            simple = result if options.as_is else simplest(result)
            print(report.difference(result, simple), flush=True)
    print(report.table(results))
    return any(result.status == "different" for result in results)


def _measure(options: argparse.Namespace) -> bool:
    """All cases in another dtype or on a GPU, where outputs are near; False."""
    found = []
    for case in _cases(options):
        found.append(agree(case))
        if options.verbose:
            print(table(found[-1:]), flush=True)
    print(table(found))
    return False


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    engine = {"device": options.device, "dtype": options.dtype}
    for seed in range(options.seed, options.seed + options.n):
        for name in options.family:
            modes = [mode for mode in options.modes if mode in MODES]
            if options.ranks_every and seed % options.ranks_every == 0:
                modes.append("ranks")
            without, prompts = tuple(options.without), tuple(options.prompts)
            yield Case(FAMILIES[name], seed, tuple(modes), without, prompts, engine)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.engine.families.drawn", description=__doc__)
    parser.add_argument("-n", type=int, default=10, help="cases per family")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    usual = [mode for mode in MODES if mode != "ranks"]
    parser.add_argument("--modes", nargs="*", choices=["alone", *MODES], default=usual)
    parser.add_argument("--prompts", nargs="+", type=int, default=list(range(PROMPTS)))
    parser.add_argument("--without", nargs="+", default=[], help="variations to switch off")
    parser.add_argument(
        "--ranks-every", type=int, default=0, help="two ranks in each case of so many; 0: none"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--as-is", action="store_true", help="don't look for simpler cases")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
