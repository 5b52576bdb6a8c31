"""Who goes first: by priority, then those that can still meet their goal, then the late ones."""

from __future__ import annotations

import random
import sys
import time

import pytest

from engine import goal_queue
from engine.goal_queue import LATE_TURN, GoalQueue, deadline_of


class Clock:
    """In place of the module's ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 5e8 + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goal_queue, "time", clock)
    return clock


def drained(queue: GoalQueue[str]) -> list[str]:
    taken = []
    while (entry := queue.first()) is not None:
        assert queue.pop() == entry
        taken.append(entry)
    assert len(queue) == 0
    return taken


def test_without_deadlines_age_decides_within_a_priority(clock):
    rng = random.Random(3)
    entries = [(rng.randrange(3), rng.random(), number) for number in range(200)]
    queue: GoalQueue[int] = GoalQueue()
    for priority, arrival, number in entries:
        queue.push(number, priority=priority, arrival=arrival)
    assert sorted(queue) == list(range(200)) and len(queue) == 200
    assert drained(queue) == [number for _, _, number in sorted(entries)]


def test_equal_times_keep_their_order(clock):
    queue: GoalQueue[object] = GoalQueue()
    entries = [object() for _ in range(50)]
    for entry in entries:
        queue.push(entry, arrival=1.0, deadline=2000.0)
    assert drained(queue) == entries


def test_late_entries_make_way_within_their_priority(clock):
    queue: GoalQueue[str] = GoalQueue()
    for name, priority, due in [("late", 0, 1001.0), ("soon", 0, 1003.0), ("later", 0, 1004.0)]:
        queue.push(name, priority=priority, arrival=0.0, deadline=due)
    queue.push("urgent and late", priority=-1, arrival=0.0, deadline=1001.0)
    queue.push("unimportant", priority=1, arrival=0.0, deadline=1002.5)
    queue.push("never late", arrival=990.0)
    clock.now = 1002.0
    assert drained(queue) == ["urgent and late", "never late", "soon", "later", "late", "unimportant"]


def test_an_entry_that_becomes_late_while_it_is_first_makes_way(clock):
    queue: GoalQueue[str] = GoalQueue()
    queue.push("a", arrival=0.0, deadline=1001.0)
    queue.push("b", arrival=0.0, deadline=1005.0)
    assert queue.first() == "a"
    clock.now = 1002.0
    assert drained(queue) == ["b", "a"]


def test_late_entries_have_their_turns_under_any_load(clock):
    """However many punctual entries there are, one of sixteen taken is the first of the late ones."""
    queue: GoalQueue[str] = GoalQueue()
    for number in range(5):
        queue.push(f"late {number}", arrival=0.0, deadline=999.0 + number / 10)
    taken = []
    for number in range(5 * LATE_TURN):
        clock.now += 0.01
        queue.push(f"punctual {number}", arrival=0.0, deadline=clock.now + 1)
        taken.append(queue.first())
        queue.pop()
    found = [place for place, name in enumerate(taken) if name.startswith("late")]
    assert found == [turn * LATE_TURN - 1 for turn in range(1, 6)]
    assert [taken[place] for place in found] == [f"late {number}" for number in range(5)]
    rest = [name for name in taken if name.startswith("punctual")]
    assert rest == [f"punctual {number}" for number in range(len(rest))]


def test_looking_takes_no_turn(clock):
    queue: GoalQueue[str] = GoalQueue()
    queue.push("late", arrival=0.0, deadline=999.0)
    queue.push("punctual", arrival=0.0, deadline=2000.0)
    assert {queue.first() for _ in range(3 * LATE_TURN)} == {"punctual"}


def test_an_overload_keeps_most_answers_in_time(clock):
    """Twice as many entries come as leave. First come, first served, few leave in time; so, nearly all that
    leave do, and the late ones have their turns."""

    def served_in_time(goal: float | None) -> float:
        queue: GoalQueue[float] = GoalQueue()
        taken: list[bool] = []
        for step in range(4000):
            clock.now += 0.01
            queue.push(clock.now, arrival=clock.now, deadline=deadline_of(goal, 1.0, clock.time()))
            if step % 2:
                came = queue.first()
                queue.pop()
                taken.append(clock.now - came <= 1.0)
        return sum(taken) / len(taken)

    assert served_in_time(None) < 0.1
    assert 1 - 1 / LATE_TURN - 0.01 < served_in_time(1.0) < 1


def test_deadlines_count_from_the_client(clock):
    assert deadline_of(None, 0.5, clock.time()) is None
    assert deadline_of(0.8, 0.5, None) == pytest.approx(1000.4)
    assert deadline_of(0.8, 0.5, clock.time() - 0.3) == pytest.approx(1000.1)
    # The other host's clock is fast.
    assert deadline_of(0.8, 0.5, clock.time() + 60) == pytest.approx(1000.4)


def test_real_clocks_are_those_of_the_callers():
    before = time.monotonic()
    found = deadline_of(10.0, 1.0, time.time() - 4.0)
    assert found is not None and before + 5.999 < found < time.monotonic() + 6.001


def test_removed_entries_are_dropped_and_are_not_late(clock):
    queue: GoalQueue[str] = GoalQueue()
    places = {
        name: queue.push(name, arrival=0.0, deadline=1001.0 + number) for number, name in enumerate("abcdef")
    }
    assert all(queue.remove(places[name]) for name in "bce") and not queue.remove(places["b"])
    assert list(queue) == ["a", "d", "f"] and len(queue) == 3
    clock.now = 1003.5
    assert queue.first() == "d"
    assert queue.remove(places["a"])
    assert drained(queue) == ["d", "f"] and queue.num_late == 1
    assert not queue.remove(places["d"]), "it was taken"


def test_nothing_is_kept_of_entries_that_were_removed(clock):
    """Late ones would come first only when no others do, which under overload is never."""
    queue: GoalQueue[object] = GoalQueue()
    queue.push(object(), arrival=0.0, deadline=900.0)
    punctual = object()
    queue.push(punctual, arrival=0.0, deadline=2000.0)
    for _ in range(2000):
        entry = object()
        place = queue.push(entry, arrival=0.0, deadline=999.0)
        references = sys.getrefcount(entry)
        assert queue.first() is punctual
        assert queue.remove(place) and sys.getrefcount(entry) == references - 1
        assert len(queue._punctual) + len(queue._late) < 100
    assert len(queue) == 2 and queue.num_late == 2001


def test_clear_drops_all(clock):
    queue: GoalQueue[str] = GoalQueue()
    queue.push("late", arrival=0.0, deadline=999.0)
    place = queue.push("punctual", arrival=0.0, deadline=2000.0)
    queue.first()
    queue.clear()
    assert queue.first() is None and not list(queue)
    assert not queue.remove(place) and len(queue) == 0
