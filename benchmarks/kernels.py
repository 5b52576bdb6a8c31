"""Measures each kernel against the machine's limits and against torch.

    python -m benchmarks.kernels [--only paged_decode,linear] [--json FILE]

It first measures the machine: a large copy (bytes read and written) and a large GEMM, in bfloat16 on a GPU.
Then it prints a row per case: microseconds; the achieved bytes or operations per second; that rate's share of
the machine's; the largest absolute difference from the kernel's reference (for sampling: of the numbers of
tokens that differ or are kept); and the microseconds of other implementations. On a GPU inputs are not in the
L2 cache.

Without a GPU this is a smoke run: tiny shapes through the references, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    kernels_attention,
    kernels_delta,
    kernels_experts,
    kernels_fp8,
    kernels_int4,
    kernels_linear,
    kernels_tokens,
)
from benchmarks.kernels_timing import Case, Clock, Problem, Rates, Work
from benchmarks.offline import versions

COLUMNS = ("kernel", "case", "us", "rate", "unit", "share", "error")
WIDTHS = (15, 34, 10, 9, 8, 7, 9)


def all_cases(device: torch.device, tiny: bool) -> list[Case]:
    modules = (
        *(kernels_attention, kernels_tokens, kernels_linear, kernels_fp8),
        *(kernels_int4, kernels_experts, kernels_delta),
    )
    return [case for module in modules for case in module.cases(device, tiny)]


def measure(case: Case, clock: Clock, rates: Rates) -> dict[str, Any]:
    """Measure a case. A failure is part of the row: under ``failed``, or in place of a peer's time."""
    row: dict[str, Any] = {"kernel": case.kernel, "case": case.label}
    try:
        problem = case.build()
        row |= figures(problem, clock, rates)
        row["peers us"] = {name: attempt(work, clock) for name, work in problem.peers.items()}
    except Exception as error:
        row["failed"] = brief(error)
    return row


def figures(problem: Problem, clock: Clock, rates: Rates) -> dict[str, Any]:
    """Measure time, rate and error of a problem."""
    result, expected = problem.check()
    error = float((result.double() - expected.double()).abs().max())
    seconds = clock.time(problem.run)
    rate = problem.amount / seconds
    return {
        "us": seconds * 1e6,
        "rate": rate / (1e12 if problem.compute else 1e9),
        "unit": "TFLOP/s" if problem.compute else "GB/s",
        "share": rate / (rates.gemm if problem.compute else rates.copy),
        "error": error,
    }


def attempt(work: Work, clock: Clock) -> float | str:
    """Return microseconds, or the reason for a failure: not every backend supports every shape."""
    try:
        return clock.time(work) * 1e6
    except Exception as error:
        return brief(error)


def brief(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:120]}"


def line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    if "failed" in row:
        return f"{row['kernel']:15} {row['case']:34} FAILED {row['failed']}"
    shown = [
        row["kernel"],
        row["case"],
        f"{row['us']:.1f}",
        f"{row['rate']:.1f}",
        row["unit"],
        f"{row['share']:.1%}",
        f"{row['error']:.1e}",
    ]
    peers = [
        f"{name} {value:.1f}" if isinstance(value, float) else f"{name} ({value[:60]})"
        for name, value in row["peers us"].items()
    ]
    return "  ".join([columns(shown), *peers])


def columns(values: Sequence[str]) -> str:
    """Align values; the first two columns are names, the others numbers."""
    pairs = zip(values, WIDTHS, strict=True)
    return " ".join(
        f"{value:{'<' if index < 2 else '>'}{width}}" for index, (value, width) in enumerate(pairs)
    )


def selected(parser: argparse.ArgumentParser, only: str | None, names: set[str]) -> set[str]:
    """Parse the comma-separated kernels of ``--only``; without it return all ``names``.

    An unknown kernel ends the command with an error.
    """
    chosen = set(only.split(",")) if only else names
    if unknown := chosen - names:
        parser.error(
            f"--only: no such kernels: {', '.join(sorted(unknown))}; choose from {', '.join(sorted(names))}"
        )
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="kernels, comma-separated; all by default")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a GPU too")
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="seconds to measure each call for, on a GPU"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = options.tiny or device.type == "cpu"
    cases = all_cases(device, tiny)
    chosen = selected(parser, options.only, {case.kernel for case in cases})
    cases = [case for case in cases if case.kernel in chosen]
    results: dict[str, Any] = {**versions(), "smoke run": tiny, "rows": []}
    print("  ".join(f"{name} {value}" for name, value in versions().items()))
    if tiny:
        print("smoke run: tiny shapes" + (", references only" if device.type == "cpu" else ""))
    torch.manual_seed(0)
    clock = Clock(device, options.seconds)
    rates = Rates.measure(clock, tiny)
    results["rates"] = asdict(rates)
    print(f"copy {rates.copy / 1e9:.1f} GB/s  GEMM {rates.gemm / 1e12:.2f} TFLOP/s  ", end="")
    print(f"empty kernel {rates.nothing * 1e6:.1f} us")
    print(columns(COLUMNS) + "  peers, us")
    for case in cases:
        results["rows"].append(measure(case, clock, rates))
        print(line(results["rows"][-1]), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.json:
            # Written after every row, so an interrupted run keeps its rows.
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
