"""Configurations of the demo's pods change under load, and no request is lost."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from tests.k8s.demo import LONG, Deployed, Traffic, keep_asking, put, streamed, wait_for
from tests.k8s.pods import Pod
from tests.serving import ROOT

pytestmark = [pytest.mark.pods, pytest.mark.timeout(1200)]


async def during(
    deployed: Deployed, change: Callable[[dict[str, Any]], Any], until: Callable[[], bool]
) -> Traffic:
    """Change the configuration while requests come to all workers, until it has come true."""
    traffic, done = Traffic(), asyncio.Event()
    async with httpx.AsyncClient(timeout=240) as client:
        asking = [
            asyncio.create_task(keep_asking(client, lambda: deployed.workers, done, traffic))
            for _ in range(2)
        ]
        stream = asyncio.create_task(streamed(client, deployed.workers[0]))
        await asyncio.to_thread(put, deployed, change)
        await asyncio.to_thread(wait_for, until, deployed.cluster)
        assert await stream
        done.set()
        await asyncio.gather(*asking)
    return traffic


async def test_counts_change_in_place_and_lose_no_request(deployed):
    before = deployed.actors()
    wanted = [{"name": "Preprocessor:pocket", "num_replicas": 2}]
    traffic = await during(
        deployed,
        lambda application: application.update(deployments=wanted),
        lambda: len(deployed.actors()) == len(before) + 1 and deployed.runs,
    )
    assert traffic.faults == [] and traffic.answered > 2
    assert before < deployed.actors(), "a replica restarted"


async def test_a_change_of_arguments_loses_no_request(deployed):
    """Replicas of every stage are replaced; each new one starts before its old one stops."""
    before = deployed.actors()
    traffic = await during(
        deployed,
        lambda application: application["args"]["models"][0]["engine"].update(max_num_seqs=16),
        lambda: deployed.runs and before.isdisjoint(deployed.actors() or before),
    )
    assert traffic.faults == [] and traffic.answered > 10


def ask(pod: Pod) -> str:
    """The text of a whole answer."""
    answer = httpx.post(
        f"http://{pod.address}:8000/v1/chat/completions", json=LONG | {"max_tokens": 60}, timeout=120
    )
    assert answer.is_success, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_model_over_two_hosts_answers_as_on_one_and_comes_back_whole(deployed):
    """Two ranks, in pods with networks of their own; then the second one is killed."""
    alone = ask(deployed.workers[0])
    addresses = {pod.address for pod in deployed.workers}

    def over(hosts: int) -> Callable[[dict[str, Any]], Any]:
        def change(application: dict[str, Any]) -> None:
            (model,) = application["args"]["models"]
            model["engine"]["tensor_parallel_size"] = model["language_model"]["hosts"] = hosts

        return change

    def spread() -> bool:
        return deployed.runs and deployed.replicas("LanguageModel:pocket") == addresses

    put(deployed, over(2))
    wait_for(spread, deployed.cluster)
    assert [ask(pod) for pod in deployed.workers] == [alone, alone]
    before = deployed.actors()
    (rank,) = (each for each in psutil.process_iter(["cmdline"]) if is_rank(each))
    rank.kill()
    wait_for(lambda: spread() and len(before - deployed.actors()) == 2, deployed.cluster)
    assert [ask(pod) for pod in deployed.workers] == [alone, alone]
    put(deployed, over(1))
    wait_for(
        lambda: deployed.runs and len(deployed.replicas("LanguageModel:pocket")) == 1,
        deployed.cluster,
    )


def is_rank(process: psutil.Process) -> bool:
    """Return whether this is a rank beyond the first of these pods' language model."""
    try:
        return "engine.executor.worker" in process.cmdline() and process.cwd() == str(ROOT)
    except psutil.Error:
        return False
