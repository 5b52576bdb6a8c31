"""The pods of a rendered RayService, with what the operator adds to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.k8s.checks import Document, cluster, container, environment
from tests.k8s.pods import Network, Pod
from tests.k8s.tools import rayservice

TOKEN = "a-token-of-the-operator"

#: The name by which workers find the head. Its service has no address of its own: the name leads to the pod.
HEAD = "sightline-head-svc.sightline.svc.cluster.local"

_LOCALHOST = "127.0.0.1 localhost\n"

#: Variables that the operator gives the Ray containers of every RayService.
_VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_PORT": "6379",
    "RAY_timeout_ms_task_wait_for_death_info": "0",
    "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_SERVE_KV_TIMEOUT_S": "5",
}


def entry(group: Document, head: bool) -> str:
    """The entry command that KubeRay composes for a pod of ``group``.

    Args:
        head: whether it is the head.
    """
    resources = container(group["template"])["resources"]
    parameters: dict[str, Any] = {"metrics-export-port": 8080, "dashboard-agent-listen-port": 52365}
    if head:
        parameters |= {"head": None, "dashboard-host": "0.0.0.0"}
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


class Cluster:
    """The head and workers of a rendered RayService.

    Args:
        found: the rendered objects.
        folder: for the pods' output.
    """

    def __init__(self, found: list[Document], network: Network, folder: Path) -> None:
        self._found, self._network, self._folder = found, network, folder
        self._hosts = folder / "hosts"
        self._hosts.write_text(_LOCALHOST)
        self.pods: list[Pod] = []
        config = cluster(rayservice(found))
        self._groups = {group["groupName"]: group for group in config["workerGroupSpecs"]}
        self._head_group = config["headGroupSpec"]

    def start_head(self) -> None:
        """Start the head, or another one, with an address of its own."""
        self.head = self._start("head", self._head_group, head=True)
        # Written in place: pods have the file mounted.
        self._hosts.write_text(f"{_LOCALHOST}{self.head.address} {HEAD}\n")

    def replace_head(self) -> None:
        """Start another head if the last has ended, as the operator does. Ray gives up after 30 seconds."""
        if self.head.ended:
            self.start_head()

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
        # Small tensors are slower with more threads.
        values |= _VARIABLES | {
            "RAY_ADDRESS": f"{'127.0.0.1' if head else HEAD}:6379",
            "OMP_NUM_THREADS": "1",
        }
        log = self._folder / f"{name}-{len(self.pods)}.log"
        pod = Pod(self._network, entry(group, head), values, self._hosts, log)
        self.pods.append(pod)
        return pod


@contextmanager
def running_cluster(found: list[Document], folder: Path) -> Iterator[Cluster]:
    """The head of a rendered RayService; its workers are started by the block."""
    with Network() as network:
        started = Cluster(found, network, folder)
        try:
            started.start_head()
            yield started
        finally:
            for pod in started.pods:
                pod.remove()
