from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.media.crew import Crew, crew

LIMIT_S = 30


def parts_of(made: Crew, most: int = 100) -> int:
    """Parts into which work of ``most`` parts is split now; all of them are at work at the same time."""
    found, meeting = [], threading.Lock()
    together: list[threading.Barrier] = []

    def work(part: int, parts: int) -> None:
        with meeting:
            if not together:
                together.append(threading.Barrier(parts))
            found.append((part, parts))
        together[0].wait(LIMIT_S)

    made.share(work, most)
    (count,) = {parts for _, parts in found}
    assert sorted(found) == [(part, count) for part in range(count)]
    return count


def test_a_lone_member_has_helpers():
    made = Crew(4)
    with made.member():
        assert crew() is made
        assert parts_of(made) == 4 and parts_of(made, 2) == 2 and parts_of(made, 1) == 1
        inside, leave = threading.Event(), threading.Event()

        def other() -> int:
            with made.member():
                inside.set()
                assert leave.wait(LIMIT_S)
                return parts_of(made)

        with ThreadPoolExecutor(1) as thread:
            late = thread.submit(other)
            assert inside.wait(LIMIT_S)
            assert parts_of(made) == 1, "helpers work for one of two images"
            leave.set()
            assert late.result(LIMIT_S) == 1
        assert parts_of(made) == 4
    assert crew() is None


def test_a_second_member_leaves_the_helpers_at_work():
    """While they help the first member, the second one has none, even once the first has gone."""
    made, inside, leave = Crew(3), threading.Event(), threading.Event()

    def work(part: int, parts: int) -> None:
        inside.set()
        assert leave.wait(LIMIT_S)

    def first() -> None:
        with made.member():
            made.share(work, 2)

    with ThreadPoolExecutor(1) as thread:
        early = thread.submit(first)
        assert inside.wait(LIMIT_S)
        with made.member():
            assert parts_of(made) == 1
        leave.set()
        early.result(LIMIT_S)
    with made.member():
        assert parts_of(made) == 3


def test_one_thread_has_no_helpers():
    made = Crew(1)
    with made.member(), made.member():
        assert parts_of(made) == 1


def test_a_part_that_raises_leaves_the_threads_free():
    made = Crew(3)

    def work(part: int, parts: int) -> None:
        raise ValueError(f"part {part} of {parts}")

    def last(part: int, parts: int) -> None:
        if part == parts - 1:
            raise ValueError("the last")

    with made.member():
        with pytest.raises(ValueError, match="part 0 of 3"):
            made.share(work, 3)
        with pytest.raises(ValueError, match="the last"):
            made.share(last, 3)
        assert parts_of(made) == 3


def test_helpers_have_no_helpers():
    made, found = Crew(3), []
    with made.member():
        made.share(lambda part, parts: found.append(crew()), 3)
    assert sorted(found, key=str) == sorted([made, None, None], key=str)
