"""Kills processes of a server of its own while it answers, and counts the answers that differ.

    python -m tests.chaos [--gpus 1] [--seconds 60] [--clients 8] [--proxy] [--eager]

The shipped model answers in bfloat16 with CUDA graphs; ``--gpus 0`` serves it on the CPU instead, with two
ranks. Each request is asked alone first, then under a load of which nothing is killed, then under the same
load while a process is killed every few seconds. Prints for both loads the failures and the share of answers
that are not those of the request alone, and why: the first token that differs, and by how much the two tokens
differ in log-probability. Ends with an error if a request failed or something stays behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import httpx

from tests.chaos.application import (
    application,
    killed_under_load,
    on_cpus,
    on_gpus,
    wait_until_nothing_is_left,
)
from tests.chaos.load import BODIES, Difference, Load, Report, margins
from tests.chaos.victims import INGRESS, RANK, STAGES, Killer
from tests.serving import Served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="1: shared by all; else one for each rank and the encoder",
    )
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--period", type=float, default=5, help="seconds between two kills")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--proxy", action="store_true", help="Ray Serve's own proxy in place of HAProxy")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    # As for the tests, see tests/conftest.py; replicas inherit it.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    change = partial(on_gpus, gpus=options.gpus, eager=options.eager) if options.gpus else on_cpus
    # Ended from outside, too, it must leave no process behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (
        tempfile.TemporaryDirectory() as folder,
        application(Path(folder), change, haproxy=not options.proxy) as served,
    ):
        failed = asyncio.run(run(served, options))
        wait_until_nothing_is_left(served)
    print("nothing stays behind" + (f"; {failed} requests failed" if failed else "; 0 requests failed"))
    raise SystemExit(bool(failed))


async def run(served: Served, options: argparse.Namespace) -> int:
    """Run all loads; the number of requests that failed."""

    def load(again_s: float = 0.0) -> Load:
        return Load(
            lambda: httpx.AsyncClient(base_url=served.root, timeout=1800), options.clients, again_s=again_s
        )

    began = time.monotonic()
    alone = load()
    await alone.learn()
    again = load()
    await again.learn()
    same = alone.wanted == again.wanted
    print(f"answers alone after {time.monotonic() - began:.1f} s; the same twice: {same}")
    gaps = {kind: await margins(served.root, body) for kind, body in BODIES.items() if "seed" not in body}
    kinds = [*STAGES, *([RANK] if options.gpus not in (1, 2) else [])]
    loads = (("no kills", [], 0), ("kills", kinds, 0), ("ingress kills", [INGRESS], 600))
    failed = 0
    seen: set[str] = set()
    for name, killed, again_s in loads:
        tried = load(again_s)
        tried.wanted = alone.wanted
        if killed:
            report = await killed_under_load(tried, Killer(served, killed, options.period), options.seconds)
        else:
            report = await _undisturbed(tried, options.seconds)
        failed += len(report.failures)
        _tell(name, report, gaps, seen)
        seen |= {_key(each) for each in report.differences}
    return failed


async def _undisturbed(load: Load, seconds: float) -> Report:
    running = asyncio.ensure_future(load.run())
    await asyncio.sleep(seconds)
    load.stopping = True
    return await running


def _key(difference: Difference) -> str:
    return json.dumps([difference.name.split(",")[0], difference.found])


def _tell(name: str, report: Report, gaps: dict[str, list[float]], seen: set[str]) -> None:
    """Print the outcome of a load.

    Args:
        gaps: for each greedy request, by how much the best two tokens of each place differ.
        seen: keys of other answers in the loads before.
    """
    answers, different = report.answered.total(), report.differences
    share = len(different) / max(answers, 1)
    new = sum(_key(each) not in seen for each in different)
    print(f"{name}: {answers} answers, {len(report.failures)} failed, asked again {report.asked_again} times")
    print(f"{name}: {len(different)} answers ({share:.2%}) differ from those alone")
    if seen and different:
        print(f"{name}: {new} of them were not seen in the loads before")
    for failure in report.failures[:5]:
        print("  failed:", failure)
    places: Counter[str] = Counter()
    for each in different:
        kind = each.name.split(",")[0]
        for found, wanted in zip(each.found, each.wanted, strict=True):
            ids, others = found[2], wanted[2]
            first = next((i for i, pair in enumerate(zip(ids, others, strict=False)) if len({*pair}) > 1), -1)
            if ids != others:
                gap = f", gap {gaps[kind][first]:.4f}" if kind in gaps and first >= 0 else ""
                places[f"{kind}: first at token {first}{gap}"] += 1
    for place, count in places.most_common(12):
        print(f"  {count} × {place}")


if __name__ == "__main__":
    main()
