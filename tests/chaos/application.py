"""The application whose processes are killed, and a run of killing them under load."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.load import Load, Report
from tests.chaos.victims import INGRESS, Killer, processes_of
from tests.metrics import is_idle, scraped
from tests.serving import UNDER_LOAD, Served, served_application, wait_for, wait_until


def on_cpus(args: dict[str, Any]) -> None:
    """Change the arguments of the shipped application: a language model of two ranks."""
    model = _alone(args)
    model["engine"]["tensor_parallel_size"] = 2


def on_gpus(args: dict[str, Any], gpus: int, *, language_models: int = 0, eager: bool = False) -> None:
    """Change the arguments of the shipped application: bfloat16 with CUDA graphs.

    Args:
        gpus: one is shared by the encoder and the language model; of several the encoder has one, and each of
            the others a rank.
        language_models: so many share the GPUs, each of which has a rank, and encode in their replicas.
        eager: without CUDA graphs.
    """
    model = _alone(args)
    ranks = ranks_of(gpus, language_models)
    model["engine"] |= {
        "device": "cuda",
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        # A killed process's memory may still be in use when the next one measures what is free.
        "gpu_memory_utilization": 0.3,
        "tensor_parallel_size": ranks,
    }
    model["language_model"]["num_gpus"] = 0.6 if gpus == 1 else ranks
    if language_models:
        model["language_model"]["num_replicas"] = language_models
        model["encoder"]["with_language_model"] = True
    else:
        model["encoder"]["num_gpus"] = 0.3 if gpus == 1 else 1


def ranks_of(gpus: int, language_models: int) -> int:
    """The ranks of each language model of :func:`on_gpus`."""
    return gpus // language_models if language_models else max(gpus - 1, 1)


def _alone(args: dict[str, Any]) -> dict[str, Any]:
    """The first model, now the only one. Its requests are carried on however often that is needed."""
    args["models"] = args["models"][:1]
    args["ingress"]["replay"] = {"max_losses": 1000, "patience_s": 900}
    for stage in (args["models"][0][name] for name in ("preprocessor", "encoder", "language_model")):
        # A process that hangs is found within a minute, not two.
        stage |= {"health_check_period_s": 2, "health_check_timeout_s": 15}
    return args["models"][0]


@contextmanager
def application(
    folder: Path, change: Callable[[dict[str, Any]], None], *, haproxy: bool = True
) -> Iterator[Served]:
    """The application; this process is not connected to its cluster."""
    environment = UNDER_LOAD if haproxy else {}
    with served_application(folder, change, environment=environment, connect=False) as served:
        yield served


async def killed_under_load(
    load: Load,
    killer: Killer,
    seconds: float,
    least: int = 2,
    answers: int = 0,
    most_s: float = math.inf,
) -> Report:
    """Kill processes under load, and return what became of the requests; arguments as :meth:`Killer.run`.

    Args:
        answers: the load goes on until at least this many requests are answered.
    """
    began = time.monotonic()
    running = asyncio.ensure_future(load.run())
    await killer.run(seconds, load.report.answered.total, least, most_s)
    await wait_until(lambda: running.done() or load.report.answered.total() >= answers, 600)
    load.stopping = True
    report = await running
    print(
        f"{time.monotonic() - began:.0f} s: killed {dict(killer.killed)}; {report.answered.total()} answers, "
        f"the longest in {report.longest_s:.0f} s; asked again {report.asked_again} times",
        flush=True,
    )
    return report


def stored(served: Served) -> list[str]:
    """References to objects that a process has put into the store (pixels and embedding rows), each with the
    process that keeps it."""
    from ray._private.internal_api import memory_summary

    # Ids of results count from 1, those of objects that were put from 100 million; little-endian.
    found = re.findall(r".*[0-9a-f]{2}e1f505\b.*", memory_summary(served.cluster))
    return [f"{_title(int(line.split('|')[1]))}: {line}" for line in found]


def _title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return "ended"


def wait_until_nothing_is_left(served: Served) -> None:
    """Until no stage holds anything of any request, and no object is stored."""
    wait_for(lambda: is_idle(scraped(served.root)))
    # Pixels and rows are kept for some seconds after their use.
    left: list[str] = []

    def nothing() -> bool:
        left[:] = stored(served)
        return not left

    try:
        wait_for(nothing)
    except AssertionError:
        raise AssertionError("objects are left in the store:\n" + "\n".join(left)) from None


@contextmanager
def as_before(served: Served) -> Iterator[None]:
    """Check after the block, in which processes of stages are killed, that no stage holds anything of any
    request, that no object is stored, and that the ingress has about as many connections and as much memory
    as before. Use everything once before the block: then only leaks grow."""
    (pid,) = processes_of(served, INGRESS)
    ingress = psutil.Process(pid)
    connections, memory = len(ingress.net_connections()), ingress.memory_info().rss
    yield
    wait_until_nothing_is_left(served)
    # Every replica has connections of its own; those of dead replicas are closed.
    wait_for(lambda: len(ingress.net_connections()) <= connections + 8)
    assert ingress.memory_info().rss <= memory + (100 << 20)
