"""The head is lost whose state is in the Redis of the manifests, and another one takes its place."""

import asyncio
import shutil
from collections.abc import Iterator

import httpx
import pytest

from tests.k8s.demo import (
    IMAGE,
    Deployed,
    Traffic,
    answered,
    deployed_demo,
    keep_asking,
    more_answers,
    streamed,
    wait_for,
)

pytestmark = [pytest.mark.pods, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def durable(tmp_path_factory) -> Iterator[Deployed]:
    """The demo with the component that keeps the head's state."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server: install Debian's redis-server")
    with deployed_demo(tmp_path_factory.mktemp("durable"), ["gcs-redis"]) as found:
        yield found


async def test_a_new_head_finds_the_replicas_and_no_stream_is_cut(durable):
    """Streams run on and begin without a head. The new head, at another address, starts no replica."""
    cluster, before = durable.cluster, durable.actors()
    traffic, done = Traffic(), asyncio.Event()
    async with httpx.AsyncClient(timeout=300) as client:
        # While Serve's new controller finds the replicas, the proxies may have none for about a second.
        asking = asyncio.create_task(keep_asking(client, lambda: durable.workers, done, traffic, tries=5))
        streams = [asyncio.create_task(streamed(client, pod)) for pod in durable.workers]
        await more_answers(2, traffic, asking)
        assert not any(stream.done() for stream in streams)
        lost = cluster.head
        # As a node that dies: nothing is told to anybody.
        await asyncio.to_thread(lost.remove)
        streams += [asyncio.create_task(streamed(client, pod)) for pod in durable.workers]
        await more_answers(2, traffic, asking)
        await asyncio.to_thread(cluster.start_head)
        await asyncio.to_thread(wait_for, lambda: durable.runs and durable.actors() == before, cluster)
        assert cluster.head.address != lost.address
        texts = await asyncio.gather(*streams)
        assert len({await answered(client, pod, IMAGE) for pod in durable.workers}) == 1
        await more_answers(10, traffic, asking)
        done.set()
        await asking
    assert len(set(texts)) == 1 and len(texts[0]) > 100
    assert traffic.faults == []
