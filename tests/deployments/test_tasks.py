"""Concurrent work of one request."""

import asyncio

import pytest

from deployments.tasks import all_or_none


async def test_results_come_in_order():
    async def one(value, done: asyncio.Event, after: asyncio.Event | None):
        if after is not None:
            await after.wait()
        done.set()
        return value

    first, second = asyncio.Event(), asyncio.Event()
    assert await all_or_none([one("a", first, second), one("b", second, None)]) == ["a", "b"]


async def test_the_first_error_cancels_the_others():
    cancelled = asyncio.Event()

    async def slow():
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def bad():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await all_or_none([slow(), bad()])
    await asyncio.wait_for(cancelled.wait(), 60)
