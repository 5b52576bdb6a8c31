"""Pods as processes of this machine, each with a network, processes and temporary files of its own.

So they run with the ports, parameters and entry commands that the manifests give them. Needs the rights of
root and Linux's namespaces.
"""

import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.serving import ROOT, wait_for


class Network:
    """A bridge to which pods are joined; this process reaches their addresses."""

    def __init__(self) -> None:
        # A run that was killed may have left its bridge.
        taken = _bridges()
        number = next(number for number in range(250) if f"pods{number}" not in taken)
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
        # A pod's end of a link may live on for a moment, with the last of its processes.
        for number in range(1, self._pods + 1):
            for left in (
                ["netns", "del", f"{self._name}-{number}"],
                ["link", "del", f"{self._name}v{number}"],
            ):
                subprocess.run(["ip", *left], check=False, capture_output=True)
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


def _bridges() -> set[str]:
    """Names of the bridges that are there, or of which a link or a pod's network is left."""
    names = Path("/run/netns")
    paths = [*Path("/sys/class/net").iterdir(), *(names.iterdir() if names.exists() else ())]
    return {found[0] for path in paths if (found := re.match(r"pods\d+", path.name))}


class Pod:
    """One running pod.

    Args:
        command: its entry command, which becomes the first of its processes, as in a container.
        values: its environment.
        hosts: the file that gives addresses to the names of services; it may change later.
        log: for its output.
        niceness: lets other pods go first, which have CPUs of their own in a cluster.
    """

    def __init__(
        self,
        network: Network,
        command: str,
        values: dict[str, str],
        hosts: Path,
        log: Path,
        niceness: int = 0,
    ) -> None:
        self._namespace, self.address = network.join()
        self.log = log
        # Like a container, a pod has its own shared memory and its own folders of Ray and HAProxy.
        folders = ["/dev/shm", "/tmp/haproxy-serve"]
        mounts = "".join(f"mkdir -p {name} && mount -t tmpfs tmpfs {name} && " for name in folders)
        ray = log.with_suffix(".ray")
        ray.mkdir()
        mounts += f"mkdir -p /tmp/ray && mount --bind {shlex.quote(str(ray))} /tmp/ray && "
        # There is no name server. Lookups of IPv6 addresses, which no pod has, must fail at once.
        resolver = hosts.with_name("resolv.conf")
        resolver.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        for file in (hosts, resolver):
            mounts += f"mount --bind {shlex.quote(str(file))} /etc/{file.name} && "
        setup = f"{mounts}exec nice -n {niceness} /bin/bash -c -- {shlex.quote(command)}"
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
        # `ip` has become `unshare`, whose one child is the entry command.
        (entry,) = psutil.Process(self._process.pid).children()
        entry.send_signal(signal.SIGTERM)

    def succeeds(self, command: list[str], values: dict[str, str]) -> bool:
        """Return whether a command succeeds in the pod's network, as a probe of kind ``exec``."""
        probe = ["ip", "netns", "exec", self._namespace, *command]
        return subprocess.run(probe, env=os.environ | values, capture_output=True, timeout=60).returncode == 0

    def answers(self, port: int) -> bool:
        """Return whether a server listens on a port of the pod."""
        try:
            socket.create_connection((self.address, port), timeout=5).close()
        except OSError:
            return False
        return True

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def remove(self) -> None:
        """End all that runs in it."""
        if not self.ended:
            # The kernel ends the others of a process namespace with its first.
            self._process.kill()
            self._process.wait(30)
        subprocess.run(["ip", "netns", "del", self._namespace], check=False, capture_output=True)


def skip_unless_possible(folder: Path) -> None:
    """Skip the test where pods can't be had: where a small one can't start, or isn't reached.

    Args:
        folder: an empty one, for the pod's output.
    """
    for name in ("ip", "unshare"):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}: install Debian's iproute2 and util-linux")
    hosts, log = folder / "hosts", folder / "log"
    hosts.write_text("127.0.0.1 localhost\n")
    try:
        with Network() as network:
            pod = Pod(network, "python -m http.server 8000", {}, hosts, log)
            try:
                wait_for(lambda: pod.ended or pod.answers(8000), 60)
                if pod.ended:
                    pytest.skip(f"a pod can't start here: {log.read_text()[-300:]}")
            finally:
                pod.remove()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs root's right to make networks: {error.stderr}")
    except AssertionError:
        pytest.skip("a pod that runs isn't reached from here")
