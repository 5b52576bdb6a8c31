"""What nothing refers to any more is freed in a process without work."""

import asyncio
import gc
import weakref

from deployments.ray_serve.garbage import collect_regularly
from tests.serving import wait_until


class Call:
    """A call as Ray Serve's router leaves it: its frame keeps the error that keeps the frame."""

    def __init__(self) -> None:
        self.itself = self


async def test_cycles_are_freed_though_nothing_is_allocated(thawed):
    gc.disable()
    collecting = asyncio.ensure_future(collect_regularly(0.01))
    try:
        await wait_until(gc.get_freeze_count)
        found = weakref.ref(Call())
        await wait_until(lambda: found() is None, 60)
    finally:
        collecting.cancel()
        gc.enable()
