"""Speed of each kernel against what the machine allows and against torch's own.

    python -m benchmarks.kernels [--only paged_decode,linear] [--json FILE]

First the machine's rates: a large copy (bytes read and written) and a large matrix product, in bfloat16 on a
GPU. Then a row per case: microseconds; the rate that they mean for the bytes or operations that the problem
needs; that rate's share of the machine's; the largest absolute difference from the kernel's reference (for
sampling: of the numbers of tokens that differ or are kept); and the microseconds of other ways to do the
same. On a GPU inputs are cold in L2.

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

from benchmarks import kernels_attention, kernels_linear, kernels_tokens
from benchmarks.kernels_timing import Case, Clock, Problem, Rates, Work
from benchmarks.offline import versions

COLUMNS = ("kernel", "case", "us", "rate", "unit", "share", "error")
WIDTHS = (15, 34, 10, 9, 8, 7, 9)


def all_cases(device: torch.device, tiny: bool) -> list[Case]:
    modules = (kernels_attention, kernels_tokens, kernels_linear)
    return [case for module in modules for case in module.cases(device, tiny)]


def measure(case: Case, clock: Clock, rates: Rates) -> dict[str, Any]:
    """The row of a case. What fails is named in the row (``failed``, or in place of a peer's time)."""
    row: dict[str, Any] = {"kernel": case.kernel, "case": case.label}
    try:
        problem = case.build()
        row |= figures(problem, clock, rates)
        row["peers us"] = {name: attempt(work, clock) for name, work in problem.peers.items()}
    except Exception as error:
        row["failed"] = brief(error)
    return row


def figures(problem: Problem, clock: Clock, rates: Rates) -> dict[str, Any]:
    found, wanted = problem.check()
    error = float((found.double() - wanted.double()).abs().max())
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
    """Microseconds, or why there are none: not every backend takes every shape."""
    try:
        return clock.time(work) * 1e6
    except Exception as error:
        return brief(error)


def brief(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:120]}"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
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
    """The first two columns are names, the others figures."""
    pairs = zip(values, WIDTHS, strict=True)
    return " ".join(
        f"{value:{'<' if index < 2 else '>'}{width}}" for index, (value, width) in enumerate(pairs)
    )


def selected(parser: argparse.ArgumentParser, only: str | None, names: set[str]) -> set[str]:
    """The comma-separated kernels of ``only``, all of ``names`` without it; the command ends at an unknown
    one."""
    wanted = set(only.split(",")) if only else names
    if unknown := wanted - names:
        parser.error(f"no such kernels: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    return wanted


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="kernels, comma-separated; all by default")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a GPU too")
    parser.add_argument("--seconds", type=float, default=0.1, help="of measuring for each call on a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = options.tiny or device.type == "cpu"
    cases = all_cases(device, tiny)
    wanted = selected(parser, options.only, {case.kernel for case in cases})
    cases = [case for case in cases if case.kernel in wanted]
    results: dict[str, Any] = {**versions(), "smoke run": tiny, "rows": []}
    print("  ".join(f"{name} {value}" for name, value in versions().items()))
    if tiny:
        print("smoke run: tiny shapes" + (", references only" if device.type == "cpu" else ""))
    torch.manual_seed(0)
    clock = Clock(device, options.seconds)
    rates = Rates.measure(clock, tiny)
    results["rates"] = asdict(rates)
    print(f"copy {rates.copy / 1e9:.1f} GB/s  matrix product {rates.gemm / 1e12:.2f} TFLOP/s  ", end="")
    print(f"next to nothing {rates.nothing * 1e6:.1f} us")
    print(columns(COLUMNS) + "  others, us")
    for case in cases:
        results["rows"].append(measure(case, clock, rates))
        print(line(results["rows"][-1]), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.json:
            # After every row: a run that is cut short leaves what it has.
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
