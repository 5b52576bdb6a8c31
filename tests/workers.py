"""Shares the tests between the workers of ``make test`` (pytest-xdist with ``--dist loadgroup``).

Tests of one group run in one worker, in order. A file is a group, so that its fixtures are made once.
"""

from __future__ import annotations

import pytest

#: Group of the tests that start processes: they run one after another, so that no two compete for the cores.
PROCESSES = "processes"
#: Applications that several tests use, in the order of the tests: none of them runs beside another.
APPLICATIONS = ("served", "served_under_load")
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
    file = item.nodeid.split("::")[0]
    # The laws of all families are one file, but each family has a checkpoint of its own.
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return f"{file} {case.name}" if hasattr(case, "name") else file


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
