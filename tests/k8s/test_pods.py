"""The demo's pods, started by the commands that the operator composes, answer and end as they should."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.k8s.checks import container, groups
from tests.k8s.pods import TOKEN, Cluster, Pod, running_cluster, skip_unless_possible
from tests.k8s.tools import documents, rayservice
from tests.serving import ROOT

pytestmark = [pytest.mark.pods, pytest.mark.timeout(600)]

#: Twelve seconds of text, on an idle machine.
LONG = {
    "model": "pocket",
    "messages": [{"role": "user", "content": "What is in this picture?"}],
    "temperature": 0,
    "max_tokens": 700,
    "ignore_eos": True,
}
SHORT = LONG | {"max_tokens": 4}


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

    def application(self) -> dict[str, Any]:
        answer = httpx.get(self.dashboard, headers=AUTHORIZED, timeout=30)
        return answer.json()["applications"].get("sightline", {}) if answer.is_success else {}

    def replicas(self, deployment: str) -> set[str]:
        """Addresses of the pods that hold the running replicas of a deployment."""
        replicas = self.application()["deployments"][deployment]["replicas"]
        return {replica["node_ip"] for replica in replicas if replica["state"] == "RUNNING"}

    def actors(self) -> set[str]:
        """Names of all replicas that run, which differ from one start to the next."""
        return {
            replica["replica_id"]
            for deployment in self.application()["deployments"].values()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        }


AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def wait_for(condition: Callable[[], Any], pods: list[Pod], seconds: float = 240) -> None:
    """Until the condition holds. Fails with the pods' output if it doesn't in time, or if the head ends."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline or pods[0].ended:
            pytest.fail("\n".join(f"{pod.log}: {pod.log.read_text()[-1500:]}" for pod in pods))
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


@pytest.fixture(scope="module")
def group() -> dict[str, Any]:
    (found,) = groups(rayservice(documents("cpu-demo")))
    return found


def joined(started: Deployed, nodes: str) -> bool:
    """Return whether all workers belong to the cluster.

    A worker that has ended is replaced, as the operator does it: Ray gives up on a node that takes more than
    30 seconds to start.
    """
    started.workers = [started.cluster.worker("cpu") if pod.ended else pod for pod in started.workers]
    found = httpx.get(nodes, headers=AUTHORIZED, timeout=30).json()["data"]["result"]["result"]
    alive = {node["node_ip"] for node in found if node["state"] == "ALIVE"}
    return {pod.address for pod in started.workers} < alive


@pytest.fixture(scope="module")
def deployed(group, tmp_path_factory) -> Iterator[Deployed]:
    """The demo with an ingress on each of two workers, configured as the operator does it."""
    skip_unless_possible()
    found = documents("cpu-demo")
    for document in found:
        if document["kind"] == "ConfigMap":
            # Requests may come for this long after a proxy was told to leave; 30 by default.
            document["data"]["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "5"
    config = yaml.safe_load(rayservice(found)["spec"]["serveConfigV2"])
    config["applications"][0]["args"]["ingress"]["num_replicas"] = 2
    with running_cluster(found, tmp_path_factory.mktemp("pods")) as cluster:
        head = f"http://{cluster.head.address}:8265"
        wait_for(lambda: httpx.get(f"{head}/api/version", headers=AUTHORIZED).is_success, cluster.pods)
        started = Deployed(cluster, [cluster.worker("cpu"), cluster.worker("cpu")], config, early=False)
        wait_for(lambda: joined(started, f"{head}/api/v0/nodes"), cluster.pods)
        started.early = any(ready(pod, group) for pod in started.workers)
        put = httpx.put(started.dashboard, json=config, headers=AUTHORIZED, timeout=120)
        assert put.is_success, put.text
        wait_for(lambda: started.application().get("status") == "RUNNING", cluster.pods)
        wait_for(lambda: all(ready(pod, group) for pod in started.workers), cluster.pods)
        yield started


def test_only_a_holder_of_the_clusters_token_gives_it_work(deployed):
    assert httpx.put(deployed.dashboard, json={"applications": []}, timeout=30).status_code in (401, 403)


def test_a_worker_is_ready_once_its_proxy_runs(deployed, group):
    assert not deployed.early
    assert all(ready(pod, group) for pod in deployed.workers)
    # The head has a proxy as well. A head that ends waits for no stream, so the manifest keeps it out.
    assert ready(deployed.cluster.head, group)
    assert rayservice(documents("cpu-demo"))["spec"]["excludeHeadPodFromServeSvc"] is True


def test_every_worker_answers(deployed):
    answers = {
        httpx.post(f"http://{pod.address}:8000/v1/chat/completions", json=SHORT, timeout=60).json()[
            "choices"
        ][0]["message"]["content"]
        for pod in deployed.workers
    }
    assert len(answers) == 1 and answers.pop()


@dataclass
class Traffic:
    """What happened to requests.

    Attributes:
        faults: of requests that came while a pod ended.
        answered: how many such requests were answered.
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


async def keep_asking(
    client: httpx.AsyncClient, endpoints: Callable[[], list[Pod]], done: asyncio.Event, traffic: Traffic
) -> None:
    """Send short requests, one after another, to the pods that the service would choose."""
    turn = 0
    while not done.is_set():
        pods = endpoints()
        pod, turn = pods[turn % len(pods)], turn + 1
        try:
            answer = await client.post(f"http://{pod.address}:8000/v1/chat/completions", json=SHORT)
            if answer.status_code == 200:
                traffic.answered += 1
            else:
                traffic.faults.append(f"{pod.address}: {answer.status_code} {answer.text[:200]}")
        except httpx.HTTPError as error:
            traffic.faults.append(f"{pod.address}: {error!r}")


def put(deployed: Deployed, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration and give it to the head, as the operator does."""
    change(deployed.config["applications"][0])
    answer = httpx.put(deployed.dashboard, json=deployed.config, headers=AUTHORIZED, timeout=120)
    assert answer.is_success, answer.text


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
        await asyncio.to_thread(wait_for, until, deployed.cluster.pods)
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
        lambda: len(deployed.actors()) == len(before) + 1 and deployed.application()["status"] == "RUNNING",
    )
    assert traffic.faults == [] and traffic.answered > 2
    assert before < deployed.actors(), "a replica restarted"


async def test_a_change_of_arguments_loses_no_request(deployed):
    """Replicas of every stage are replaced; each new one starts before its old one stops."""
    before = deployed.actors()
    traffic = await during(
        deployed,
        lambda application: application["args"]["models"][0]["engine"].update(max_num_seqs=16),
        lambda: not before & deployed.actors() and deployed.application()["status"] == "RUNNING",
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
        return (
            deployed.application()["status"] == "RUNNING"
            and deployed.replicas("LanguageModel:pocket") == addresses
        )

    put(deployed, over(2))
    wait_for(spread, deployed.cluster.pods)
    assert [ask(pod) for pod in deployed.workers] == [alone, alone]
    before = deployed.actors()
    (rank,) = (each for each in psutil.process_iter(["cmdline"]) if is_rank(each))
    rank.kill()
    wait_for(lambda: spread() and len(before - deployed.actors()) == 2, deployed.cluster.pods)
    assert [ask(pod) for pod in deployed.workers] == [alone, alone]
    put(deployed, over(1))
    wait_for(
        lambda: (
            deployed.application()["status"] == "RUNNING"
            and len(deployed.replicas("LanguageModel:pocket")) == 1
        ),
        deployed.cluster.pods,
    )


def is_rank(process: psutil.Process) -> bool:
    """Return whether this is a rank beyond the first of these pods' language model."""
    try:
        return "engine.executor.worker" in process.cmdline() and process.cwd() == str(ROOT)
    except psutil.Error:
        return False


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
        while traffic.answered < 4:
            assert not asking.done() and not traffic.faults, traffic
            await asyncio.sleep(0.1)
        assert not any(stream.done() for stream in streams)
        leaving.terminate()
        await asyncio.sleep(1)
        left.set()
        texts = await asyncio.gather(*streams)
        flipped = asyncio.create_task(
            asyncio.to_thread(wait_for, lambda: not ready(leaving, group), deployed.cluster.pods, 60)
        )
        await flipped
        await asyncio.to_thread(wait_for, lambda: leaving.ended, deployed.cluster.pods)
        done.set()
        await asking
    assert len(set(texts)) == 1 and len(texts[0]) > 100
    assert traffic.faults == []
    assert ready(staying, group)
    assert deployed.replicas("LanguageModel:pocket") == {staying.address}
