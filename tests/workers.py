"""Shares the tests between the workers of ``make test`` (pytest-xdist with ``--dist loadgroup``).

Tests of one group run in one worker, in order. A file is a group, so that its fixtures are made once; the
tests that all families share are a group for each family.
"""

from __future__ import annotations

import os

import pytest

#: Group of the tests that start processes: they run one after another, so that no two compete for the cores.
PROCESSES = "processes"
#: Applications that several tests use, in the order of the tests: none of them runs beside another.
APPLICATIONS = ("served", "served_under_load")
#: Priority ("nice") of the other tests, so that they compute while those of the group above wait.
LOWER_PRIORITY = 5
#: Marks of such tests.
_STARTS_PROCESSES = ("ray", "processes")
#: Folders and files that take longest, longest first. They start first, so that the workers end together.
_LONGEST = (
    "tests/engine/families/",
    "tests/engine/kernels/",
    "tests/engine/test_faults.py",
    "tests/engine/test_generation.py",
    "tests/chaos/",
    "tests/deployments/test_replay.py",
    "tests/deployments/test_resumption.py",
    "tests/benchmarks/",
    "tests/models/",
    "tests/k8s/",
    "tests/engine/",
    "tests/deployments/",
)


def starts_processes(item: pytest.Item) -> bool:
    """Return True if the test is marked as one that starts processes, or uses the session's application."""
    return bool(application_of(item)) or any(item.get_closest_marker(name) for name in _STARTS_PROCESSES)


def application_of(item: pytest.Item) -> str:
    """The fixture of the session's application that the test uses; empty if it uses none.

    A test may get it by the parameter ``server``, whose value is the fixture's name.
    """
    callspec = getattr(item, "callspec", None)
    names = {*getattr(item, "fixturenames", ())} | ({callspec.params.get("server")} if callspec else set())
    # A file's own fixture of that name is another application.
    shared = "shared_applications" in names
    return next((name for name in APPLICATIONS if shared and name in names), "")


def group_of(item: pytest.Item) -> str:
    """The name of the group that ``item`` belongs to."""
    if starts_processes(item):
        return PROCESSES
    # Each family has a checkpoint and a reference of its own, which tests of several files use.
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return f"family {case.name}" if hasattr(case, "name") else item.nodeid.split("::")[0]


def give_way(item: pytest.Item) -> None:
    """Lower the priority of this worker, unless ``item`` starts processes: such tests come first."""
    if not starts_processes(item) and os.getpriority(os.PRIO_PROCESS, 0) < LOWER_PRIORITY:
        os.setpriority(os.PRIO_PROCESS, 0, LOWER_PRIORITY)


def assign_groups(items: list[pytest.Item]) -> None:
    """Mark each test with its group, and put the groups in the order in which they are handed out."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: _rank(item.nodeid, group_of(item)))


def _rank(nodeid: str, group: str) -> int:
    """0 for the tests that start processes, then the place in ``_LONGEST``."""
    if group == PROCESSES:
        return 0
    return 1 + next((i for i, prefix in enumerate(_LONGEST) if nodeid.startswith(prefix)), len(_LONGEST))
