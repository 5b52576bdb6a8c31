"""The demo's pods, started by the commands that the operator composes, answer and end as they should."""

import asyncio

import httpx
import pytest

from tests.k8s.demo import (
    IMAGE,
    SHORT,
    Traffic,
    answered,
    keep_asking,
    more_answers,
    ready,
    streamed,
    wait_for,
)
from tests.k8s.tools import documents, rayservice

pytestmark = [pytest.mark.pods, pytest.mark.timeout(1200)]


def test_only_a_holder_of_the_clusters_token_gives_it_work(deployed):
    assert httpx.put(deployed.dashboard, json={"applications": []}, timeout=30).status_code in (401, 403)


def test_a_worker_is_ready_once_its_proxy_runs(deployed, group):
    assert not deployed.early
    # The head has a proxy as well. A head that ends waits for no stream, so the manifest keeps it out.
    for pod in (*deployed.workers, deployed.cluster.head):
        wait_for(lambda pod=pod: ready(pod, group), deployed.cluster)
    assert rayservice(documents("cpu-demo"))["spec"]["excludeHeadPodFromServeSvc"] is True


async def test_every_worker_answers(deployed):
    async with httpx.AsyncClient(timeout=120) as client:
        for body in (SHORT, IMAGE):
            texts = {await answered(client, pod, body) for pod in deployed.workers}
            assert len(texts) == 1 and texts.pop()


async def test_a_pod_that_is_deleted_cuts_no_stream_and_loses_no_request(deployed, group):
    """The pod with the language model and one ingress ends while streams run through both pods."""
    (address,) = deployed.replicas("LanguageModel:pocket")
    assert address in deployed.replicas("Ingress")
    leaving = next(pod for pod in deployed.workers if pod.address == address)
    staying = next(pod for pod in deployed.workers if pod is not leaving)
    traffic, done, left = Traffic(), asyncio.Event(), asyncio.Event()
    async with httpx.AsyncClient(timeout=240) as client:
        streams = [asyncio.create_task(streamed(client, pod)) for pod in (leaving, staying) * 3]
        # Kubernetes takes a pod that is deleted out of the service; nodes hear of it a little later.
        asking = asyncio.create_task(
            keep_asking(client, lambda: [staying] if left.is_set() else [leaving, staying], done, traffic)
        )
        await more_answers(4, traffic, asking)
        assert not any(stream.done() for stream in streams)
        leaving.terminate()
        await asyncio.sleep(1)
        left.set()
        texts = await asyncio.gather(*streams)
        cluster = deployed.cluster
        await asyncio.to_thread(wait_for, lambda: not ready(leaving, group), cluster)
        await asyncio.to_thread(wait_for, lambda: leaving.ended, cluster)
        done.set()
        await asking
    assert len(set(texts)) == 1 and len(texts[0]) > 100
    assert traffic.faults == []
    wait_for(lambda: ready(staying, group), cluster)
    wait_for(lambda: deployed.replicas("LanguageModel:pocket") == {staying.address}, cluster)
