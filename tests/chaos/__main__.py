"""Kills processes of a server of its own while it answers, and counts the answers that differ.

    python -m tests.chaos [--gpus 1] [--language-models 2] [--seconds 60] [--clients 8] [--proxy] [--eager]

The shipped model answers in bfloat16 with CUDA graphs; ``--gpus 0`` serves it on the CPU instead, with two
ranks. Each request is asked alone first, then under a load of which nothing is killed, then under the same
load while a process is killed every few seconds, and then while the ingress is. Prints for each load the
failures and the share of answers that are not those of the request alone, and why: the first token that
differs, and by how much the two tokens differ in log-probability. Ends with an error if a request failed or
something stays behind.

The load with kills takes ``--seconds``, and up to as much again until each kind was killed twice; the two
other loads take a third of it each. All else, the last check included, takes at most ``--spare`` seconds:
if the time is up, the run ends with an error that says what it was at. Then the application is ended.
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
    ranks_of,
    wait_until_nothing_is_left,
)
from tests.chaos.load import BODIES, Difference, Load, Report, margins
from tests.chaos.victims import ENGINE, INGRESS, RANK, STAGES, Killer
from tests.serving import Served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="1: shared by all; else one for each rank and the encoder",
    )
    parser.add_argument(
        "--language-models", type=int, default=0, help="so many share the GPUs, and encode in their replicas"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of the load with kills, at least")
    parser.add_argument("--spare", type=float, default=240, help="seconds for all but the loads, at most")
    parser.add_argument("--period", type=float, default=5, help="seconds between two kills")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--proxy", action="store_true", help="Ray Serve's own proxy in place of HAProxy")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    # As for the tests, see tests/conftest.py; replicas inherit it.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    several = {"language_models": options.language_models, "eager": options.eager}
    change = partial(on_gpus, gpus=options.gpus, **several) if options.gpus else on_cpus
    # Ended from outside, too, it must leave no temporary folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    progress = Progress(longest(options))
    with (
        tempfile.TemporaryDirectory() as folder,
        application(Path(folder), change, haproxy=not options.proxy) as served,
        progress,
    ):
        failed = asyncio.run(run(served, options, progress))
        progress.begin("the check that nothing stays behind")
        wait_until_nothing_is_left(served)
    print(f"nothing stays behind; {failed} requests failed", flush=True)
    raise SystemExit(bool(failed))


def longest(options: argparse.Namespace) -> float:
    """Seconds after which the run ends at the latest."""
    return 2 * options.seconds + 2 * options.seconds / 3 + options.spare


class Progress:
    """Prints what the run is at, and ends the program by an error once its time is up.

    Args:
        limit_s: the time in seconds, from now to the end of the ``with`` block. What ends the application
            comes after it, and must not be interrupted.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began = time.monotonic()
        signal.signal(signal.SIGALRM, self._end)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        self.begin("the start of the application")

    def begin(self, phase: str) -> None:
        self._phase = phase
        print(f"after {time.monotonic() - self._began:.0f} s: {phase}", flush=True)

    def _end(self, *_: object) -> None:
        sys.exit(f"the run has not ended after {self._limit_s:.0f} s: it was at {self._phase}")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


async def run(served: Served, options: argparse.Namespace, progress: Progress) -> int:
    """Run all loads; the number of requests that failed."""

    def load(again_s: float = 0.0) -> Load:
        return Load(
            lambda: httpx.AsyncClient(base_url=served.root, timeout=1800), options.clients, again_s=again_s
        )

    progress.begin("requests alone")
    alone = load()
    await alone.learn()
    again = load()
    await again.learn()
    same = alone.wanted == again.wanted
    print(f"answers alone; the same twice: {same}", flush=True)
    gaps = {kind: await margins(served.root, body) for kind, body in BODIES.items() if "seed" not in body}
    kinds = [stage for stage in STAGES if not options.language_models or stage != "VisionEncoder"]
    kinds.append(ENGINE)
    if options.gpus == 0 or ranks_of(options.gpus, options.language_models) > 1:
        kinds.append(RANK)
    all_s = options.seconds
    loads = (
        ("no kills", [], 0, all_s / 3, 0.0),
        ("kills", kinds, 0, all_s, 2 * all_s),
        ("ingress kills", [INGRESS], 600, 0, all_s / 3),
    )
    failed = 0
    seen: set[str] = set()
    for name, killed, again_s, least_s, most_s in loads:
        progress.begin(f"the load with {name}")
        tried = load(again_s)
        tried.wanted = alone.wanted
        if killed:
            killer = Killer(served, killed, options.period)
            report = await killed_under_load(tried, killer, least_s, most_s=most_s)
        else:
            report = await _undisturbed(tried, least_s)
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
