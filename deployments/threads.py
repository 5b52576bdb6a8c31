"""Sharing of the GIL between the threads of a replica, and work on other threads."""

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds for which a thread may keep the GIL while another waits for it.
TURN_S = 0.0002
#: The same in a process whose threads all work for one engine. They wait for each other all the same: with
#: shorter turns tokens come no sooner, and a tenth of the process's CPU time goes into taking turns.
ENGINE_TURN_S = 0.001


def take_turns(turn_s: float = TURN_S) -> None:
    """Let the threads of this process take turns often.

    By default a thread waits up to 5 ms for the GIL while another thread computes. The thread that
    launches GPU work waits for it at least once a step, and a decode step takes 2 ms. So a busy event loop
    would delay the next tokens by more time than they take.
    """
    sys.setswitchinterval(turn_s)


async def on_thread(threads: Executor, work: Callable[..., T], *args: Any) -> T:
    """The result of ``work(*args)``, computed by one of ``threads``.

    Takes half the time of the event loop's ``run_in_executor``, which links two futures.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work(*args)
        except BaseException as error:
            loop.call_soon_threadsafe(_settle, future, None, error)
        else:
            loop.call_soon_threadsafe(_settle, future, result, None)

    threads.submit(run)
    return await future


def _settle(future: asyncio.Future, result: Any, error: BaseException | None) -> None:
    # Whoever waited may have been cancelled.
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
