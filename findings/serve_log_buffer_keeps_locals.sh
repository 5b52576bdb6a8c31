#!/usr/bin/env bash
# Ray Serve: with its throughput settings, a warning that names an error keeps the request's data for hours.
#
# RAY_SERVE_THROUGHPUT_OPTIMIZED=1 lets Serve's log handler collect records and write them later, when there are
# 1000 or at the next record of level ERROR. It collects the records themselves, not their text: their arguments
# live on, and an error among them has a traceback, whose frames have all local variables of the request.
#
# Expected: what a request has used is free once it has been answered; a buffer of log lines holds lines.
# Why it matters to a server of vision-language models: a replica that logs "trying again: %s" keeps pixels or
# references to them, so Ray's object store fills after each restart of a part of the server, and
# neither idling nor garbage collection helps. So Sightline makes the text of each record when it is logged.
set -euo pipefail
work=$(mktemp -d /tmp/serve-XXXX)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "ray[serve]==2.60.0"
cat > "$work/keeps.py" <<'PY'
import gc
import logging
import weakref

import ray
from ray import serve

log = logging.getLogger("ray.serve")


class Pixels:
    """Stands for what a request brought."""


# RAY_SERVE_THROUGHPUT_OPTIMIZED=1 sets this size; alone it can be set for the replica only.
ENVIRONMENT = {"env_vars": {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000"}}


@serve.deployment(ray_actor_options={"num_cpus": 0, "runtime_env": ENVIRONMENT})
class Model:
    def __init__(self):
        self.seen = []

    def work(self):
        pixels = Pixels()
        self.seen.append(weakref.ref(pixels))
        raise ValueError("a part of the server was lost")

    def request(self, how):
        try:
            self.work()
        except ValueError as error:
            log.warning("trying again: %s", error if how == "error" else str(error))

    def alive(self):
        gc.collect()
        return sum(each() is not None for each in self.seen)

    def log_an_error(self):
        log.error("something else")


handle = serve.run(Model.bind(), route_prefix=None)
print("ray", ray.__version__)
for _ in range(3):
    handle.request.remote("text").result()
assert handle.alive.remote().result() == 0
for _ in range(3):
    handle.request.remote("error").result()
kept = handle.alive.remote().result()
handle.log_an_error.remote().result()
after = handle.alive.remote().result()
print(f"objects of 3 answered requests that are alive: {kept}; after the next record of level ERROR: {after}")
assert (kept, after) == (3, 0), "records are kept in another way now"
serve.shutdown()
PY
cd "$work"
RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR="$work/ray" "$work/venv/bin/python" keeps.py
