#!/usr/bin/env bash
# Ray Serve 2.60: one client that leaves cancels a handler twice, and the first time not the handler but what it waits for.
#
# A handler awaits a call of another deployment. When its client leaves, Serve cancels the handler's request and, since
# cancellation goes down to the calls that a request has made, that call as well.
#
# Expected: the handler's task is cancelled: one CancelledError is raised where it awaits, and the task's cancelling()
# is 1, by which asyncio tells a cancelled task from a task that awaits something cancelled.
# What happens: mostly the call is cancelled first. Its await raises CancelledError in a task that nobody has cancelled:
# cancelling() is 0. Milliseconds later the task itself is cancelled, in whatever it does by then.
# Why it matters to a server of vision-language models: an ingress that carries an answer on elsewhere takes a call
# that ends while its own request lives for a lost stage. It sends the work of a client that has left on to another
# replica, and counts a loss. And clean-up that awaits something, behind "except CancelledError", is cut off by the
# second cancellation. Sightline waits for a moment before it takes such an end for a loss.
set -euo pipefail
work=$(mktemp -d /tmp/serve-XXXX)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "ray[serve]==2.60.0"
cat > "$work/twice.py" <<'PY'
import asyncio
import http.client
import sys
import time
from pathlib import Path

import ray
from fastapi import FastAPI
from ray import serve

TRIES, PORT = 10, 8961
app, notes = FastAPI(), Path(sys.argv[1])


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Model:
    async def work(self):
        await asyncio.sleep(600)


@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Ingress:
    def __init__(self, model):
        self.model = model

    @app.get("/{number}")
    async def answer(self, number: int):
        try:
            await self.model.work.remote()
        except asyncio.CancelledError:
            requested = asyncio.current_task().cancelling()
            try:
                await asyncio.sleep(3)
                later = "nothing more"
            except asyncio.CancelledError:
                later = "again"
            (notes / f"{number}.part").write_text(f"{requested} {later}")
            (notes / f"{number}.part").rename(notes / str(number))
            raise


serve.start(http_options={"port": PORT})
serve.run(Ingress.bind(Model.bind()))
print("ray", ray.__version__)
found = []
for number in range(TRIES):
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    connection.request("GET", f"/{number}")
    time.sleep(0.7)
    connection.close()
    until = time.monotonic() + 30
    while not (notes / str(number)).exists() and time.monotonic() < until:
        time.sleep(0.1)
    found.append((notes / str(number)).read_text())
serve.shutdown()
for seen in sorted(set(found)):
    requested, later = seen.split(" ", 1)
    print(f"{found.count(seen)} of {TRIES}: CancelledError while cancelling() is {requested}, then {later}")
assert "0 again" in found, "no await is cancelled before its task now"
PY
cd "$work"
mkdir notes
RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR="$work/ray" "$work/venv/bin/python" twice.py "$work/notes" 2> errors || { tail -20 errors; exit 1; }
