"""CPU time of the processes of a served application, by what they do."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> Counter[str]:
    """Seconds of CPU time, user and system, that running processes of Ray and HAProxy have used.

    Replicas are counted under the name of their deployment; all other processes of Ray under ``ray``.
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
        program = title.partition(" ")[0]
        if title.startswith("ray::ServeReplica:"):
            # ray::ServeReplica:APPLICATION:DEPLOYMENT, or DEPLOYMENT:MODEL for the stages of a model.
            name = title.split(":")[4].strip()
        elif program.endswith("haproxy"):
            name = "haproxy"
        elif title.startswith("ray::") or program.rpartition("/")[2] in ("raylet", "gcs_server"):
            name = "ray"
        else:
            continue
        yield name, (int(fields[11]) + int(fields[12])) / _TICK
