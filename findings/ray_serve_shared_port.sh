#!/usr/bin/env bash
# Ray Serve: two servers that know nothing of each other start on one port, and each gets some of the requests.
#
# Serve's proxy binds its HTTP port with SO_REUSEPORT, so that several proxies of one cluster can share it. A
# second `serve run` with a cluster of its own binds the same port as well. Both say that they are ready.
#
# Expected: the second server ends with "address already in use", as other web servers do.
# Why it matters to a server of vision-language models: whoever starts a second model without a look at the
# port, or restarts a server whose first process still lives, gets answers of both models at random, each with
# status 200. A health check can't see it. So Sightline checks the port before `make serve` starts anything.
set -euo pipefail
work=$(mktemp -d /tmp/serve-XXXX)
servers=()
finish() {
    for server in "${servers[@]}"; do kill -TERM "$server" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "ray[serve]==2.60.0"
export PATH="$work/venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 PYTHONPATH="$work"
port=$("$work/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
for name in one two; do
    cat > "$work/$name.py" <<PY
from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Model:
    def __call__(self, request):
        return "model $name"


app = Model.bind()
PY
    cat > "$work/$name.yaml" <<YAML
proxy_location: HeadOnly
http_options: {host: 127.0.0.1, port: $port}
applications: [{name: $name, route_prefix: /, import_path: "$name:app"}]
YAML
    # "local": a cluster of its own.
    (cd "$work" && RAY_TMPDIR="$work/$name" exec serve run --address local "$name.yaml") > "$work/$name.log" 2>&1 &
    servers+=($!)
    for _ in $(seq 120); do
        grep -q "Adding 1 replica" "$work/$name.log" && break
        kill -0 "${servers[-1]}" || { tail -5 "$work/$name.log"; exit 1; }
        sleep 1
    done
done
python -c 'import ray; print("ray", ray.__version__)'
python - "$port" <<'PY'
import collections
import sys
import time
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}/"
seen = collections.Counter()
deadline = time.monotonic() + 60
while len(seen) < 2 and time.monotonic() < deadline:
    for _ in range(40):
        try:
            seen[urllib.request.urlopen(url, timeout=30).read().decode()] += 1
        except urllib.error.HTTPError:
            time.sleep(0.1)  # A replica is starting.
print(dict(seen))
assert len(seen) == 2, "only one of the servers answers now"
PY
