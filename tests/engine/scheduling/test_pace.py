"""The share of a step for which the device would be idle, with times that are given."""

from types import SimpleNamespace

import pytest

from engine.scheduling import pace
from engine.scheduling.pace import StepPace


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list of one."""
    now = [100.0]
    # For this module alone: engines of other tests may run in threads.
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_steps_one_after_the_other(clock):
    """Launching takes 1 s, computing 8 s from then on, and taking the tokens in 2 s."""
    times = StepPace()
    assert times.idle_share == 0.0, "nothing is known yet"
    for _ in range(3):
        begun = times.begin()
        clock[0] += 1
        times.launched()
        clock[0] += 8
        times.arrived(begun)
        clock[0] += 2
        times.taken()
        # Idle times count for nothing.
        clock[0] += 1000
    assert times.idle_share == pytest.approx(3 / 9)


def test_a_step_begins_when_the_one_before_ends(clock):
    """The second step is scheduled and launched while the first one runs; each takes 10 s."""
    times = StepPace()
    first = times.begin()
    clock[0] += 1
    times.launched()
    second = times.begin()
    clock[0] += 1
    times.launched()
    clock[0] += 8
    times.arrived(first)
    times.taken()
    clock[0] += 10
    times.arrived(second)
    # Launching took 1 s each time, and taking in the first tokens nothing.
    assert times.idle_share == pytest.approx(1 / 10)
