"""Garbage collection in a process that may allocate nothing for a long time."""

import asyncio
import gc

#: Seconds between two collections. Without the objects of the start each takes a few milliseconds.
PERIOD_S = 5.0


async def collect_regularly(period_s: float = PERIOD_S) -> None:
    """Collect garbage every ``period_s`` seconds, until cancelled. Call it once the process is set up: what
    is alive then is left out of all further collections.

    A call that is cancelled while it waits for a replica stays in a reference cycle: in Ray Serve 2.60
    ``AsyncioRouter.assign_request`` keeps the error, and with it the frames that hold the call's arguments.
    These are references to pixels and embeddings, which stay in Ray's object store as long as the references
    live. Python collects garbage after so many allocations, of which an ingress without requests makes none.
    """
    gc.collect()
    gc.freeze()
    while True:
        await asyncio.sleep(period_s)
        gc.collect()
