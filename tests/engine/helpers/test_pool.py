"""Helper processes: what they are asked and answer, and what becomes of those that die."""

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from engine.errors import MediaError, Overloaded, Unavailable
from engine.helpers.files import file_of, taken
from engine.helpers.pool import Helper, HelperPool, Task
from tests.serving import wait_for

SCRIPT = Path(__file__).with_name("echo.py")
#: Far more than any answer here takes.
LONG = 60.0


def start() -> Helper:
    return Helper(SCRIPT, {"hello": 1}, "repeats")


@pytest.fixture
def pool():
    pool = HelperPool(start, 2, busy="busy", queue_limit=0.1)
    yield pool
    pool.close()


def test_messages_of_any_length_come_back(pool):
    with pool.helper() as helper:
        assert helper.started == {"hello": 1}
        for size in (0, 1, 70_000, 3_000_000):
            message = {"text": "ä" * size}
            assert helper.ask(message, LONG) == (message, None)


def test_files_go_both_ways_and_stay_open_nowhere(pool):
    data = np.arange(200_000).astype(np.uint8)
    with pool.helper() as helper:
        before = len(os.listdir("/proc/self/fd"))
        theirs = len(os.listdir(f"/proc/{helper.process_id}/fd"))
        for _ in range(3):
            with file_of(data) as file:
                answer, made = helper.ask({}, LONG, file)
            assert answer == {"size": 200_000}
            assert (taken(made, (200, 1000)) == data[::-1].reshape(200, 1000)).all()
        assert len(os.listdir("/proc/self/fd")) == before
        # The process closes the last file after it has answered.
        wait_for(lambda: len(os.listdir(f"/proc/{helper.process_id}/fd")) == theirs)


@pytest.mark.parametrize("message", [{"crash": 1}, {"memory": 1 << 30}, {"sleep": 1000}])
def test_a_process_that_dies_or_is_too_slow_is_replaced(pool, message):
    with pool.helper() as helper:
        first = helper.process_id
        assert helper.ask(message, 0.3 if "sleep" in message else LONG) is None
        assert helper.is_dead
    assert not psutil.pid_exists(first)
    with pool.helper() as helper:
        assert helper.process_id != first
        assert helper.ask({"a": 1}, LONG) == ({"a": 1}, None)
    with pool.helper() as helper:
        assert helper.process_id != first


@pytest.mark.parametrize("seconds", [math.inf, 1e30])
def test_a_time_may_be_endless(pool, seconds):
    with pool.helper() as helper:
        assert helper.ask({"a": 1}, seconds) == ({"a": 1}, None)


def test_a_second_process_starts_only_for_a_second_task(pool):
    ids = set()
    for _ in range(3):
        with pool.helper() as helper:
            ids.add(helper.process_id)
    assert len(ids) == 1
    with pool.helper() as one, pool.helper() as other:
        assert one.process_id != other.process_id
        with pytest.raises(Overloaded, match="busy"), pool.helper():
            pass


def test_closing_waits_for_tasks_and_the_pool_may_be_used_again(pool):
    with pool.helper() as helper:
        first = helper.process_id
        closing = threading.Thread(target=pool.close)
        closing.start()
        assert helper.ask({"a": 1}, LONG) == ({"a": 1}, None)
    closing.join(LONG)
    assert not psutil.pid_exists(first)
    with pool.helper() as helper:
        assert helper.ask({"a": 1}, LONG) == ({"a": 1}, None)


def test_a_process_that_cannot_start_is_said_to_be_missing(tmp_path):
    with pytest.raises(Unavailable, match="process that repeats could not be started"):
        Helper(tmp_path / "nothing.py", {}, "repeats")


def test_a_task_shares_its_seconds_and_names_the_fault(pool):
    def failed(reason: str) -> MediaError:
        return MediaError(f"here: {reason}")

    with pool.helper() as helper:
        task = Task(helper, LONG, failed, "it takes too long")
        assert task.ask({"a": 1}) == ({"a": 1}, None)
        with pytest.raises(MediaError, match=r"^here: it is wrong$"):
            task.ask({"refuse": "it is wrong"})
        assert not helper.is_dead
        brief = Task(helper, 0.5, failed, "it takes too long")
        with pytest.raises(MediaError, match=r"^here: it takes too long$"):
            for _ in range(100):
                brief.ask({"sleep": 0.05})


def test_a_process_ends_with_its_parent_even_while_it_works():
    parent = (
        "import sys; from tests.engine.helpers.test_pool import start; helper = start()\n"
        "print(helper.process_id, flush=True); helper.ask({'sleep': 1000}, 1000)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        helper = int(process.stdout.readline())
        assert psutil.pid_exists(helper)
        process.kill()
    wait_for(lambda: not psutil.pid_exists(helper) or psutil.Process(helper).status() == "zombie")
