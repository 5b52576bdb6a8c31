"""Threads of a replica share its interpreter fairly, and work for the event loop."""

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deployments.threads import ENGINE_TURN_S, TURN_S, on_thread, take_turns


@pytest.mark.parametrize("turn", [TURN_S, ENGINE_TURN_S])
def test_threads_take_turns_more_often_than_a_step_takes(turn):
    before = sys.getswitchinterval()
    try:
        take_turns(turn)
        assert sys.getswitchinterval() == pytest.approx(turn)
        assert turn <= 0.001
    finally:
        sys.setswitchinterval(before)


async def test_work_on_a_thread_gives_its_result_or_its_error():
    with ThreadPoolExecutor(1) as threads:
        name = await on_thread(threads, lambda: threading.current_thread().name)
        assert name != threading.current_thread().name
        assert await on_thread(threads, max, 1, 2) == 2
        with pytest.raises(KeyError, match="gone"):
            await on_thread(threads, {}.__getitem__, "gone")


async def test_work_that_nobody_waits_for_any_more_ends_in_silence():
    failures = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    go = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        waiting = asyncio.ensure_future(on_thread(threads, go.wait))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go.set()
        assert await on_thread(threads, abs, -1) == 1
    assert not failures
