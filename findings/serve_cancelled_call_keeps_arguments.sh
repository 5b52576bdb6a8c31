#!/usr/bin/env bash
# Ray Serve: a call that is cancelled while it waits for a replica keeps its arguments until a garbage collection.
#
# AsyncioRouter.assign_request, which finds a replica for a call, handles the cancellation by
# `except asyncio.CancelledError as e: exc = e; ...; raise`. Python deletes `e` behind the block, but not `exc`: the
# frame keeps the error, the error's traceback keeps the frame, and the frame has the call's arguments. Python
# frees such a cycle at its next full garbage collection, which takes many allocations to begin.
#
# Expected: what a call was given is free once the call has been cancelled.
# Why it matters to a server of vision-language models: stages pass images and embeddings as references to objects
# in Ray's store. Calls wait for a replica whenever it has died or is full, and are cancelled when a client leaves
# or another image of its request fails. Megabytes of each such request then stay in the store, for minutes where
# little else happens. So Sightline's ingress collects garbage every few seconds.
set -euo pipefail
work=$(mktemp -d /tmp/serve-XXXX)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "ray[serve]==2.60.0"
cat > "$work/keeps.py" <<'PY'
import asyncio
import gc
import weakref

import ray
from ray import serve


class Pixels:
    """Stands for what a call is given."""


@serve.deployment(max_ongoing_requests=1, ray_actor_options={"num_cpus": 0})
class Model:
    async def work(self, seconds, pixels=None):
        await asyncio.sleep(seconds)


async def cancelled(handle, waits):
    """A call that is cancelled, while it waits for a replica or in one; the weak reference to its argument."""
    pixels = Pixels()
    found = weakref.ref(pixels)
    if waits:
        blocking = handle.work.remote(5)
        await asyncio.sleep(1)
    call = asyncio.ensure_future(awaited(handle.work.remote(60, pixels)))
    await asyncio.sleep(1)
    call.cancel()
    await asyncio.wait([call])
    if waits:
        await blocking
    await asyncio.sleep(3)
    return found


async def awaited(response):
    try:
        await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def main():
    handle = serve.get_app_handle("default")
    await handle.work.remote(0)
    for waits in (False, True):
        gc.collect()
        gc.disable()
        found = await cancelled(handle, waits)
        kept = found() is not None
        gc.enable()
        gc.collect()
        place = "waiting for a replica" if waits else "in a replica"
        print(f"cancelled {place}: the argument is {'kept' if kept else 'free'};", end=" ")
        print("after a garbage collection it is", "free" if found() is None else "kept")
        assert found() is None
        if waits:
            assert kept, "a cancelled call frees its arguments now"


serve.run(Model.bind(), route_prefix=None)
print("ray", ray.__version__)
asyncio.run(main())
serve.shutdown()
PY
cd "$work"
RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR="$work/ray" "$work/venv/bin/python" keeps.py
