"""``make test`` shares the tests between its workers."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serving import ROOT, SharedApplication
from tests.workers import APPLICATIONS, LOWER_PRIORITY, application_of, group_of, starts_processes


def test_xdist_knows_the_group_of_each_test(request):
    """xdist reads the marks before most hooks run, and hands out single tests if it finds none."""
    items = request.session.items
    if not hasattr(request.config, "workerinput"):
        pytest.skip("no workers: make test WORKERS=0")
    for item in items:
        name, _, group = item.nodeid.rpartition("@")
        assert group == group_of(item), name


def test_other_tests_give_way_to_those_that_start_processes(request):
    items = request.session.items
    if not hasattr(request.config, "workerinput"):
        pytest.skip("no workers: make test WORKERS=0")
    groups = [starts_processes(item) for item in items]
    assert groups == sorted(groups, reverse=True), "the worker that starts processes does nothing else before"
    assert os.getpriority(os.PRIO_PROCESS, 0) >= LOWER_PRIORITY


#: A patch of what tasks and threads of a whole process use, such as the applications of earlier tests.
CLOCKS = re.compile(
    r"""setattr\(\s*(?:["'](?:\w+\.)*(?:asyncio|time|threading)\.\w+["']|"""
    r"""(?:\w+\.)*(?:asyncio|time|threading),\s*["'])"""
)


def test_a_test_changes_the_clock_of_one_module_only():
    """A sleep that takes no time has a server in the same event loop run for ever."""
    assert all(
        CLOCKS.search(f"patch.{text}")
        for text in (
            'setattr("deployments.replay.asyncio.sleep", sleep)',
            'setattr(pace.time, "perf_counter", clock)',
        )
    )
    assert not CLOCKS.search('patch.setattr("deployments.replay.asyncio", other)')
    found = [path for path in (ROOT / "tests").rglob("*.py") if CLOCKS.search(path.read_text())]
    assert found == [ROOT / "tests" / "test_workers.py"]


@pytest.fixture
def life(monkeypatch) -> list[str]:
    """What happens to applications, which are not started really; "broken" makes the next start fail."""
    life: list[str] = []

    @contextmanager
    def application(folder):
        life.append(f"start in {folder}")
        if "broken" in life:
            raise RuntimeError("planted")
        yield object()
        life.append("end")

    monkeypatch.setattr("tests.serving.served_application", application)
    return life


def test_the_application_starts_once_and_ends_once(life):
    shared = SharedApplication(lambda: Path("here"))
    assert life == []
    assert shared.get() is shared.get()
    shared.close()
    shared.close()
    assert life == ["start in here", "end"]
    shared.get()
    assert life[2:] == ["start in here"]
    shared.close()


def test_an_application_that_does_not_start_is_not_started_again(life):
    life.append("broken")
    shared = SharedApplication(lambda: Path("here"))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="planted"):
            shared.get()
    shared.close()
    assert life == ["broken", "start in here"]


def test_tests_that_use_an_application_come_one_after_another(request):
    """Or it would be started and ended several times, or beside another."""
    using = [application_of(item) for item in request.session.items if starts_processes(item)]
    assert using == sorted(using, key=("", *APPLICATIONS).index)
