"""What a program has started ends with it."""

import subprocess
import sys

import psutil

from tests.serving import ROOT, wait_for

#: Prints the ids of the process that waits and of one that it starts, which leaves its session.
PROGRAM = """
import subprocess, sys
from benchmarks.orphans import end_with_this_process
waiting = end_with_this_process()
started = subprocess.Popen({command}, start_new_session=True, stdout=subprocess.PIPE, text=True)
print(waiting.pid, started.pid, {more}, flush=True)
sys.stdin.read()
"""
SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
INNER = PROGRAM.format(command=SLEEPER, more="''")
#: Starts a program that does the same.
OUTER = PROGRAM.format(command=[sys.executable, "-S", "-c", INNER], more="started.stdout.readline().strip()")


def run(program: str, *, kill: bool) -> tuple[int, list[psutil.Process]]:
    """Kill a program, or let it end; return its exit status and the processes that were started."""
    command = [sys.executable, "-S", "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        started = [psutil.Process(int(each)) for each in process.stdout.readline().split()]
        assert all(map(lives, started))
        if kill:
            process.kill()
    return process.returncode, started


def lives(process: psutil.Process) -> bool:
    """Return whether a process runs; nobody may have asked yet for the status of one that has ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_they_end_with_a_program_that_is_killed_and_those_that_they_have_started_too():
    status, started = run(OUTER, kill=True)
    assert status == -9 and len(started) == 4
    wait_for(lambda: not any(map(lives, started)))


def test_they_end_with_a_program_that_ends():
    status, started = run(INNER, kill=False)
    assert status == 0 and len(started) == 2
    wait_for(lambda: not any(map(lives, started)))
