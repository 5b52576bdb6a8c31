"""A language model over several Ray nodes of this machine: one gang of replicas for each copy."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from deployments.config import AppConfig
from engine import LLM, SamplingParams
from tests.engine import tiny
from tests.serving import ROOT, free_port, wait_for

pytestmark = [pytest.mark.pods, pytest.mark.processes, pytest.mark.timeout(500)]

PROMPT = [5, 6, 7, 8, 9]
NAME = "LanguageModel:tiny"


@dataclass
class Nodes:
    """An application with one language model, on a Ray cluster of a head and several nodes.

    Attributes:
        root: the application's address.
        folder: the model's.
    """

    cluster: Any
    root: str
    folder: str

    def add(self) -> None:
        """Start one more node, which can hold one host of the model."""
        self.cluster.add_node(
            num_cpus=1, object_store_memory=80 << 20, labels={"sightline/stage": "generate"}
        )

    def deploy(self, hosts: int) -> None:
        """Spread the model over ``hosts`` nodes, with a rank on each."""
        from ray import serve

        from deployments.app import build

        model = {
            "name": "tiny",
            "engine": {
                "model": self.folder,
                "tensor_parallel_size": hosts,
                "max_model_len": 500,
                "kv_cache_bytes": 1 << 20,
            },
            "language_model": {
                "hosts": hosts,
                "num_cpus": 1,
                "label_selector": {"sightline/stage": "generate"},
                "max_surge_percent": 0,
                "graceful_shutdown_timeout_s": 20,
                "health_check_period_s": 1,
            },
        }
        config = AppConfig.model_validate({"models": [model], "ingress": {"num_cpus": 0}})
        serve.run(build(config), name="sightline")
        wait_for(lambda: len(self.replicas()) == hosts, 200)

    def replicas(self) -> list[dict[str, Any]]:
        """Details of the model's running replicas."""
        import ray
        from ray import serve

        controller = serve.context._get_global_client()._controller
        details = ray.get(controller.get_serve_instance_details.remote())
        found = details["applications"]["sightline"]["deployments"][NAME]["replicas"]
        return [replica for replica in found if replica["state"] == "RUNNING"]

    def names(self) -> set[str]:
        return {replica["replica_id"] for replica in self.replicas()}

    def places(self) -> set[str]:
        """Ids of the nodes that hold a host of the model."""
        return {replica["node_id"] for replica in self.replicas()}

    def first(self) -> str:
        """Id of the node that holds the engine."""
        (first,) = (replica for replica in self.replicas() if not ranks(replica["pid"]))
        return first["node_id"]

    def ask(self, length: int = 40) -> str:
        body = {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{self.root}/v1/completions", json=body, timeout=200)
        assert answer.is_success, answer.text
        return answer.json()["choices"][0]["text"]

    def ask_on(self, length: int, on_first: Callable[[], None]) -> str:
        """The text of a stream; ``on_first`` is called when it has begun."""
        body = {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        text = ""
        with httpx.stream("POST", f"{self.root}/v1/completions", json=body, timeout=200) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    if not text:
                        on_first()
                    text += event["choices"][0]["text"]
        return text


def ranks(replica: int) -> list[psutil.Process]:
    """Processes of ranks that a replica has started: those of hosts without the engine."""
    found = psutil.Process(replica).children(recursive=True)
    return [process for process in found if "engine.executor.worker" in process.cmdline()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    return str(tiny.make_text(path, "llama", seed=3, num_key_value_heads=4))


@pytest.fixture(scope="module")
def alone(folder) -> Callable[[int], str]:
    """The text of an answer of so many tokens, by one rank in this process."""
    llm = LLM(model=folder, max_model_len=500, kv_cache_bytes=1 << 20)

    def answer(length: int) -> str:
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        return llm.generate({"prompt_token_ids": PROMPT}, params)[0].outputs[0].text

    return answer


@pytest.fixture(scope="module")
def nodes(folder) -> Iterator[Nodes]:
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Each node's processes inherit these.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20},
        )
        try:
            ray.init(cluster.address, log_to_driver=False)
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
            found = Nodes(cluster, f"http://127.0.0.1:{port}", folder)
            for _ in range(4):
                found.add()
            yield found
            serve.shutdown()
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_four_hosts_and_two_give_the_text_of_one(nodes, alone):
    for hosts in (4, 2):
        nodes.deploy(hosts)
        assert len(nodes.places()) == hosts
        assert [nodes.ask(), nodes.ask()] == [alone(40)] * 2


def test_a_host_that_dies_moves_the_whole_model_and_the_stream_goes_on(nodes, alone):
    before = nodes.names()
    follower = next(replica for replica in nodes.replicas() if ranks(replica["pid"]))
    text = nodes.ask_on(400, lambda: os.kill(follower["pid"], signal.SIGKILL))
    assert text == alone(400)
    wait_for(lambda: len(nodes.names() - before) == 2, 200)
    assert not before & nodes.names()


def test_a_host_that_is_drained_moves_the_whole_model_and_loses_no_request(nodes, alone):
    import ray
    from ray.core.generated import autoscaler_pb2

    before, leaving = nodes.names(), (nodes.places() - {nodes.first()}).pop()
    gcs = ray._raylet.GcsClient(address=nodes.cluster.gcs_address)
    deadline = int(time.time() * 1000) + 300_000
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(nodes.ask, 400)
        accepted, why = gcs.drain_node(leaving, reason, "test", deadline)
        assert accepted, why
        texts = []
        while len(nodes.names() - before) < 2 or before & nodes.names():
            texts.append(nodes.ask())
        assert long.result(200) == alone(400)
    assert texts and set(texts) == {alone(40)}
    assert leaving not in nodes.places() and len(nodes.places()) == 2
    assert nodes.ask() == alone(40)
