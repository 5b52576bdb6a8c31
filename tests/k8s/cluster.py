"""The pods of a rendered RayService, with what the operator adds to them."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.k8s.checks import Document, cluster, container, environment
from tests.k8s.pods import Network, Pod
from tests.k8s.tools import rayservice
from tests.serving import haproxy_program, wait_for

TOKEN = "a-token-of-the-operator"
#: The value of every Secret that the manifests want.
PASSWORD = "a-password-of-the-tests"

#: The name by which workers find the head. Its service has no address of its own: the name leads to the pod.
HEAD = "sightline-head-svc.sightline.svc.cluster.local"

#: Variables that the operator gives the Ray containers of every RayService.
_ALL = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_PORT": "6379",
    "RAY_timeout_ms_task_wait_for_death_info": "0",
    "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_SERVE_KV_TIMEOUT_S": "5",
}


def entry(group: Document, head: bool, fault_tolerant: bool) -> str:
    """The entry command that KubeRay composes for a pod of ``group``.

    Args:
        head: whether it is the head.
        fault_tolerant: whether the cluster's state outlives the head.
    """
    resources = container(group["template"])["resources"]
    parameters: dict[str, Any] = {"metrics-export-port": 8080, "dashboard-agent-listen-port": 52365}
    if head:
        parameters |= {"head": None, "dashboard-host": "0.0.0.0"}
        if fault_tolerant:
            parameters["redis-password"] = "$REDIS_PASSWORD"
    else:
        parameters["address"] = f"{HEAD}:6379"
    parameters |= {
        # Of the requests, since no limit is set.
        "num-cpus": resources["requests"]["cpu"],
        "memory": int(resources["limits"]["memory"].removesuffix("Gi")) << 30,
    }
    if labels := group.get("labels"):
        parameters["labels"] = ",".join(f"{key}={value}" for key, value in labels.items())
    parameters |= group.get("rayStartParams") or {}
    words = [f"--{key}" if value is None else f"--{key}={value}" for key, value in parameters.items()]
    return f"ulimit -n 65536; ray start {' '.join(words)} --block"


def variables(options: Document, head: bool) -> dict[str, str]:
    """The variables that KubeRay gives a Ray container.

    Args:
        options: ``gcsFaultToleranceOptions``, empty without.
        head: whether it is the head's container.
    """
    values = _ALL | {"RAY_ADDRESS": f"{'127.0.0.1' if head else HEAD}:6379"}
    if not options:
        return values
    if head:
        values |= {"RAY_external_storage_namespace": "an-id-of-the-cluster"}
        values |= {"RAY_REDIS_ADDRESS": options["redisAddress"], "REDIS_PASSWORD": PASSWORD}
    else:
        values["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
    return values


class Cluster:
    """The head and workers of a rendered RayService, and its Redis if there is one.

    Args:
        found: the rendered objects.
        folder: for the pods' output.
    """

    def __init__(self, found: list[Document], network: Network, folder: Path) -> None:
        self._found, self._network, self._folder = found, network, folder
        self._addresses: dict[str, str] = {}
        self._hosts = folder / "hosts"
        # As in the image.
        self._haproxy = haproxy_program(folder)
        self.pods: list[Pod] = []
        self.redis: Pod | None = None
        config = cluster(rayservice(found))
        self._groups = {group["groupName"]: group for group in config["workerGroupSpecs"]}
        self._head_group = config["headGroupSpec"]
        self._options = config.get("gcsFaultToleranceOptions") or {}
        self._name()

    def start(self) -> None:
        """Start the head, and Redis before it."""
        if self._options:
            self.start_redis()
        self.start_head()

    def start_head(self) -> Pod:
        """Start a head, with an address of its own: the first one, or the one that follows a lost one."""
        self.head = self._start("head", self._head_group, head=True)
        self._name(**{HEAD: self.head.address})
        return self.head

    def replace_head(self) -> None:
        """Start another head if the last has ended, as the operator does. Ray gives up after 30 seconds."""
        if self.head.ended:
            self.start_head()

    def start_redis(self) -> Pod:
        """Start the Redis of the manifests, with the data of the one before."""
        (stateful,) = (document for document in self._found if document["kind"] == "StatefulSet")
        redis = container(stateful["spec"]["template"])
        command = [*redis["command"], *redis["args"]]
        for mount in redis["volumeMounts"]:
            volume = self._folder / mount["name"]
            volume.mkdir(exist_ok=True)
            command[-1] = command[-1].replace(mount["mountPath"], str(volume))
        values = {variable["name"]: PASSWORD for variable in redis["env"]}
        pod = self._pod("redis", shlex.join(command), values)
        name, _, port = self._options["redisAddress"].partition(":")
        assert int(port) == redis["ports"][0]["containerPort"]
        self._name(**{name: pod.address})
        probe = redis["readinessProbe"]["exec"]["command"]
        wait_for(lambda: pod.succeeds(probe, values))
        self.redis = pod
        return pod

    def worker(self, group: str) -> Pod:
        """Start a pod of ``group``."""
        return self._start(group, self._groups[group], head=False)

    def _start(self, name: str, group: Document, head: bool) -> Pod:
        values = {
            key: value
            for key, value in environment(self._found, group["template"]).items()
            # The Secrets of these are optional, and absent.
            if value is not None
        }
        values |= variables(self._options, head)
        # Small tensors are slower with more threads.
        values |= {"RAY_SERVE_HAPROXY_BINARY_PATH": str(self._haproxy), "OMP_NUM_THREADS": "1"}
        command = entry(group, head, bool(self._options))
        # In a cluster the head has CPUs of its own. Ray aborts a node whose agents take 15 seconds to start.
        return self._pod(name, command, values, niceness=0 if head else 5)

    def _pod(self, name: str, command: str, values: dict[str, str], niceness: int = 0) -> Pod:
        log = self._folder / f"{name}-{len(self.pods)}.log"
        pod = Pod(self._network, command, values, self._hosts, log, niceness)
        self.pods.append(pod)
        return pod

    def _name(self, **addresses: str) -> None:
        """Let names lead to addresses, in every pod. The file is written in place: pods have it mounted."""
        self._addresses |= addresses
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self._addresses.items())]
        self._hosts.write_text("\n".join(lines) + "\n")


@contextmanager
def running_cluster(found: list[Document], folder: Path) -> Iterator[Cluster]:
    """The head of a rendered RayService; its workers are started by the block."""
    with Network() as network:
        started = Cluster(found, network, folder)
        try:
            started.start()
            yield started
        finally:
            for pod in started.pods:
                pod.remove()
