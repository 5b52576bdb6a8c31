"""The demo's cluster as pods of this machine, and requests to it."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deployments.pictures import ask, circle
from tests.k8s.checks import container, groups
from tests.k8s.cluster import TOKEN, Cluster, running_cluster
from tests.k8s.pods import Pod, skip_unless_possible
from tests.k8s.tools import documents, rayservice, with_components

#: Twelve seconds of text, on an idle machine.
LONG = {
    "model": "pocket",
    "messages": [{"role": "user", "content": "What is in this picture?"}],
    "temperature": 0,
    "max_tokens": 700,
    "ignore_eos": True,
}
SHORT = LONG | {"max_tokens": 4}
#: A question that every stage works for.
IMAGE = SHORT | {"messages": ask("What is in this picture?", circle("red"))}

#: Variables of all pods, beside those of the manifests.
VARIABLES = {
    # Requests may come for this long after a proxy was told to leave; 30 by default.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10",
    # A proxy that a slow machine holds up isn't started anew; 5, 10 and 30 by default.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "60",
}

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


@dataclass
class Deployed:
    """The demo's cluster with two workers.

    Attributes:
        config: the serve config.
        early: whether a worker was ready before the application was deployed.
    """

    cluster: Cluster
    workers: list[Pod]
    config: dict[str, Any]
    early: bool

    @property
    def dashboard(self) -> str:
        return f"http://{self.cluster.head.address}:8265/api/serve/applications/"

    def ask_head(self, path: str) -> httpx.Response:
        """The answer of the head's dashboard."""
        url = f"http://{self.cluster.head.address}:8265{path}"
        return httpx.get(url, headers=AUTHORIZED, timeout=30)

    def application(self) -> dict[str, Any]:
        answer = self.ask_head("/api/serve/applications/")
        return answer.json()["applications"].get("sightline", {}) if answer.is_success else {}

    @property
    def runs(self) -> bool:
        """Return whether the application runs as configured. Fails if the configuration was refused."""
        found = self.application()
        assert found.get("status") != "DEPLOY_FAILED", found.get("message")
        return found.get("status") == "RUNNING"

    def replicas(self, deployment: str) -> set[str]:
        """Addresses of the pods that hold the running replicas of a deployment."""
        found = self.application().get("deployments", {}).get(deployment, {"replicas": []})
        return {replica["node_ip"] for replica in found["replicas"] if replica["state"] == "RUNNING"}

    def actors(self) -> set[str]:
        """Names of all replicas that run, which differ from one start to the next."""
        return {
            replica["replica_id"]
            for deployment in self.application().get("deployments", {}).values()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        }


def wait_for(condition: Callable[[], Any], cluster: Cluster, seconds: float = 480) -> None:
    """Wait until the condition holds, and replace a head that ends, as the operator does.

    At the deadline it skips the test if a node took more than the 30 seconds that Ray allows for its start:
    this machine is too slow. Otherwise it fails, with the pods' output.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        cluster.replace_head()
        if time.monotonic() > deadline:
            logs = {str(pod.log): pod.log.read_text() for pod in cluster.pods}
            if any("timed out during startup" in text for text in logs.values()):
                pytest.skip("this machine is too slow: a node of Ray must start within 30 seconds")
            pytest.fail("\n".join(f"{log}: {text[-1500:]}" for log, text in logs.items()))
        time.sleep(0.3)


def ready(pod: Pod, group: dict[str, Any]) -> bool:
    """Return whether the pod's readiness probe succeeds."""
    probe = container(group["template"])["readinessProbe"]
    ports = {port["name"]: port["containerPort"] for port in container(group["template"])["ports"]}
    port, path = ports[probe["httpGet"]["port"]], probe["httpGet"]["path"]
    try:
        return httpx.get(f"http://{pod.address}:{port}{path}", timeout=probe["timeoutSeconds"]).is_success
    except httpx.HTTPError:
        return False


def demo_group() -> dict[str, Any]:
    """The one group of the demo."""
    (found,) = groups(rayservice(documents("cpu-demo")))
    return found


def add_worker(started: Deployed) -> None:
    """Start a worker and wait until it belongs to the cluster.

    If it ends, another one is started, as the operator does it.
    """
    worker = started.cluster.worker("cpu")

    def joined() -> bool:
        nonlocal worker
        if worker.ended:
            worker = started.cluster.worker("cpu")
        answer = started.ask_head("/api/v0/nodes")
        found = answer.json()["data"]["result"]["result"] if answer.is_success else []
        return worker.address in {node["node_ip"] for node in found if node["state"] == "ALIVE"}

    wait_for(joined, started.cluster)
    started.workers.append(worker)


@contextmanager
def deployed_demo(folder: Path, components: Sequence[str] = ()) -> Iterator[Deployed]:
    """The demo with an ingress on each of two workers, configured as the operator does it.

    Args:
        folder: for the output of the pods.
        components: names of the parts that are added to the overlay.
    """
    for name in ("trial", "overlay"):
        (folder / name).mkdir()
    skip_unless_possible(folder / "trial")
    group = demo_group()
    found = with_components("cpu-demo", [*components], folder / "overlay")
    for document in found:
        if document["kind"] == "ConfigMap":
            document["data"] |= VARIABLES
    config = yaml.safe_load(rayservice(found)["spec"]["serveConfigV2"])
    config["applications"][0]["args"]["ingress"]["num_replicas"] = 2
    with running_cluster(found, folder) as cluster:
        started = Deployed(cluster, [], config, early=False)
        wait_for(lambda: started.ask_head("/api/version").is_success, cluster)
        # One after the other: on few cores, both together could take longer than Ray allows.
        add_worker(started)
        add_worker(started)
        started.early = any(ready(pod, group) for pod in started.workers)
        put = httpx.put(started.dashboard, json=config, headers=AUTHORIZED, timeout=240)
        assert put.is_success, put.text
        wait_for(lambda: started.runs, cluster)
        wait_for(lambda: all(ready(pod, group) for pod in started.workers), cluster)
        yield started


@dataclass
class Traffic:
    """Outcomes of requests.

    Attributes:
        faults: of requests that were not answered.
        answered: how many requests were answered.
    """

    faults: list[str] = field(default_factory=list)
    answered: int = 0


async def streamed(client: httpx.AsyncClient, pod: Pod) -> str:
    """The text of a whole stream; fails if it is cut."""
    text, ended = "", False
    url = f"http://{pod.address}:8000/v1/chat/completions"
    async with client.stream("POST", url, json=LONG | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["delta"].get("content") or ""
    assert ended, "the stream was cut"
    return text


async def answered(client: httpx.AsyncClient, pod: Pod, body: dict[str, Any]) -> str:
    """The text of a whole answer."""
    response = await client.post(f"http://{pod.address}:8000/v1/chat/completions", json=body)
    assert response.is_success, response.text
    return response.json()["choices"][0]["message"]["content"]


async def keep_asking(
    client: httpx.AsyncClient,
    endpoints: Callable[[], list[Pod]],
    done: asyncio.Event,
    traffic: Traffic,
    tries: int = 1,
) -> None:
    """Send short requests, one after another, to the pods that the service would choose.

    Args:
        tries: how often each request is sent until it is answered.
    """
    turn = 0
    while not done.is_set():
        for left in reversed(range(tries)):
            pods = endpoints()
            pod, turn = pods[turn % len(pods)], turn + 1
            try:
                answer = await client.post(f"http://{pod.address}:8000/v1/chat/completions", json=SHORT)
                fault = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:200]}"
            except httpx.HTTPError as error:
                fault = repr(error)
            # Leaves time to whatever starts meanwhile, and comes back.
            await asyncio.sleep(2 if fault else 0.3)
            if not fault:
                traffic.answered += 1
                break
            if not left:
                traffic.faults.append(f"{pod.address}: {fault}")


async def more_answers(count: int, traffic: Traffic, asking: asyncio.Task[None]) -> None:
    """Wait until ``count`` more requests are answered; none may fail."""
    wanted = traffic.answered + count
    async with asyncio.timeout(240):
        while traffic.answered < wanted:
            assert not asking.done() and not traffic.faults, traffic
            await asyncio.sleep(0.1)


def put(deployed: Deployed, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration and give it to the head, as the operator does."""
    change(deployed.config["applications"][0])
    answer = httpx.put(deployed.dashboard, json=deployed.config, headers=AUTHORIZED, timeout=120)
    assert answer.is_success, answer.text
