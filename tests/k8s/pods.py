"""Pods as processes of this machine, each with a network, processes and temporary files of its own.

So they run with the ports, parameters and entry commands that the manifests give them. Needs the rights of
root and Linux's namespaces.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.checks import Document, cluster, container, environment
from tests.k8s.tools import rayservice
from tests.serving import ROOT

TOKEN = "a-token-of-the-operator"


class Network:
    """A bridge to which pods are joined; this process reaches their addresses.

    Args:
        number: tells it from others on this machine, below 250.
    """

    def __init__(self, number: int) -> None:
        # Addresses that are set aside for tests of networks.
        self._prefix = f"198.18.{number}"
        self._name = f"pods{number}"
        self._pods = 0

    def __enter__(self) -> "Network":
        _run("ip", "link", "add", self._name, "type", "bridge")
        _run("ip", "addr", "add", f"{self._prefix}.1/24", "dev", self._name)
        _run("ip", "link", "set", self._name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        _run("ip", "link", "del", self._name)

    def join(self) -> tuple[str, str]:
        """A new namespace on the bridge: its name and its address."""
        self._pods += 1
        name, address = f"{self._name}-{self._pods}", f"{self._prefix}.{self._pods + 1}"
        outer = f"{self._name}v{self._pods}"
        _run("ip", "netns", "add", name)
        _run(
            "ip",
            "link",
            "add",
            outer,
            "master",
            self._name,
            "up",
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            name,
        )
        for command in (
            ["addr", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
            ["route", "add", "default", "via", f"{self._prefix}.1"],
        ):
            _run("ip", "-n", name, *command)
        return name, address


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def skip_unless_possible() -> None:
    """Skips the test where pods can't be had."""
    for name in ("ip", "unshare"):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}")
    tried = ["ip", "link", "add", "podstry", "type", "bridge"]
    if os.geteuid() or subprocess.run(tried, capture_output=True).returncode:
        pytest.skip("needs the right to make network namespaces")
    _run("ip", "link", "del", "podstry")


class Pod:
    """One running pod.

    Args:
        command: its entry command, which becomes the first of its processes, as in a container.
        log: for its output.
    """

    def __init__(self, network: Network, command: str, values: dict[str, str], log: Path) -> None:
        self._namespace, self.address = network.join()
        self.log = log
        # What a container has of its own: its shared memory, and the folders of Ray and HAProxy.
        folders = ["/dev/shm", "/tmp/ray", "/tmp/haproxy-serve"]
        mounts = "".join(f"mkdir -p {name} && mount -t tmpfs tmpfs {name} && " for name in folders)
        setup = f"{mounts}exec /bin/bash -c -- {shlex.quote(command)}"
        # The first process of a namespace is `setup`, which becomes the entry command.
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--ipc"]
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with log.open("w") as output:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace, *namespaces, "/bin/bash", "-c", setup],
                cwd=ROOT,
                env=kept | {"PATH": path, "PYTHONPATH": str(ROOT), "POD_IP": self.address} | values,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # However this process ends, no pod outlives it.
                preexec_fn=_die_with_parent,
            )

    def terminate(self) -> None:
        """Ask the entry command to end, as Kubernetes does when a pod is deleted."""
        import psutil

        # `ip` has become `unshare`, whose one child is the entry command.
        (entry,) = psutil.Process(self._process.pid).children()
        entry.send_signal(signal.SIGTERM)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def remove(self) -> None:
        """End all that runs in it."""
        if not self.ended:
            # The kernel ends the others of a process namespace with its first.
            self._process.kill()
            self._process.wait(30)
        subprocess.run(["ip", "netns", "del", self._namespace], check=False)


def entry(group: Document, head: str = "") -> str:
    """The entry command that KubeRay composes for a pod of ``group``.

    Args:
        head: the head's address; empty for the head itself.
    """
    resources = container(group["template"])["resources"]
    parameters: dict[str, Any] = {"metrics-export-port": 8080, "dashboard-agent-listen-port": 52365}
    if head:
        parameters |= {"address": f"{head}:6379"}
    else:
        parameters |= {"head": None, "dashboard-host": "0.0.0.0"}
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
        self.pods: list[Pod] = []
        config = cluster(rayservice(found))
        self._groups = {group["groupName"]: group for group in config["workerGroupSpecs"]}
        self._head_group = config["headGroupSpec"]
        self.head = self._start("head", self._head_group)

    def worker(self, group: str) -> Pod:
        """A new pod of ``group``."""
        return self._start(group, self._groups[group], self.head.address)

    def _start(self, name: str, group: Document, head: str = "") -> Pod:
        values = {
            key: value
            for key, value in environment(self._found, group["template"]).items()
            # The Secrets here are optional, and there are none.
            if value is not None
        }
        values |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        log = self._folder / f"{name}-{len(self.pods)}.log"
        pod = Pod(self._network, entry(group, head), values, log)
        self.pods.append(pod)
        return pod


def _namespaces() -> list[Path]:
    """The network namespaces that have names."""
    folder = Path("/run/netns")
    return [*folder.iterdir()] if folder.exists() else []


@contextmanager
def running_cluster(found: list[Document], folder: Path) -> Iterator[Cluster]:
    """The head of a rendered RayService; its workers are started by the block."""
    # A run that was killed may have left its bridge.
    taken = {path.name.partition("-")[0] for path in [*Path("/sys/class/net").iterdir(), *_namespaces()]}
    number = next(n for n in range(250) if f"pods{n}" not in taken)
    with Network(number) as network:
        started = Cluster(found, network, folder)
        try:
            yield started
        finally:
            for pod in started.pods:
                pod.remove()
