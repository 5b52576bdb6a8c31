"""The processes of a served application: their CPU time by what they do, and the cluster that they form."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> Counter[str]:
    """Seconds of CPU time, user and system, that running processes of Ray and HAProxy have used.

    Replicas are counted under the name of their deployment, the processes of engines as ``Engine``, and all
    other processes of Ray as ``ray``.
    """
    used: Counter[str] = Counter()
    for name, seconds in _processes():
        used[name] += seconds
    return used


def _processes() -> Iterator[tuple[str, float]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            # The second field is the program's name in parentheses, which may hold spaces.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            # It has ended meanwhile.
            continue
        name = process_name(title)
        if name is not None:
            yield name, (int(fields[11]) + int(fields[12])) / _TICK


def process_name(title: str) -> str | None:
    """The name that :func:`cpu_seconds` gives to a process with this command line; None if it is not counted.

    A replica's title is ``ray::ServeReplica:APPLICATION:DEPLOYMENT``, with ``:MODEL`` behind it for the
    stages of a model, and ``.METHOD`` while it serves a call.
    """
    program = title.partition(" ")[0]
    if title.startswith("ray::ServeReplica:"):
        return program.split(":")[4].partition(".")[0]
    if " deployments.ray_serve.engine_server " in title:
        return "Engine"
    if program.endswith("haproxy"):
        return "haproxy"
    if title.startswith("ray::") or program.rpartition("/")[2] in ("raylet", "gcs_server"):
        return "ray"
    return None


def cluster_of(server: psutil.Process) -> str:
    """The address of the one Ray cluster that ``server`` has started."""
    found = set()
    for child in server.children(recursive=True):
        # It may have ended meanwhile.
        with suppress(psutil.NoSuchProcess):
            for argument in child.cmdline():
                if argument.startswith("--gcs-address="):
                    found.add(argument.removeprefix("--gcs-address="))
    assert len(found) == 1, found
    return found.pop()
