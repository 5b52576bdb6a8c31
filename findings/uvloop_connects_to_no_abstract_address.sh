#!/usr/bin/env bash
# uvloop: create_unix_connection can't reach an abstract address at which its own create_unix_server listens.
#
# Linux has Unix sockets whose address begins with a zero byte and is no file: nothing is left of them when their
# process ends. asyncio takes such addresses in both methods. uvloop takes them in create_unix_server, which binds a
# socket of Python's, but connects by libuv, which reads the address as a C string: an empty one.
#
# Expected: the connection that asyncio's loop makes, or an error when the server is made.
# What happens: OSError 22, "Invalid argument", from create_unix_connection alone.
# Why it matters to a server of vision-language models: Ray Serve's replicas run uvloop, tests run asyncio. A side
# channel of theirs works in all tests; served, the way to fall back is taken without a word. A socket that was
# connected before is taken: create_unix_connection(..., sock=connected).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q uvloop==0.23.0
cat > "$work/abstract.py" <<'PY'
import asyncio
import socket
import uuid

import uvloop


async def connect() -> tuple[str, str]:
    address = f"\0{uuid.uuid4().hex}"
    loop = asyncio.get_running_loop()
    await loop.create_unix_server(asyncio.Protocol, address)
    found = []
    for by_address in (True, False):
        try:
            if by_address:
                await loop.create_unix_connection(asyncio.Protocol, address)
            else:
                connected = socket.socket(socket.AF_UNIX)
                connected.setblocking(False)
                connected.connect(address)
                await loop.create_unix_connection(asyncio.Protocol, sock=connected)
            found.append("connected")
        except OSError as error:
            found.append(str(error))
    return found[0], found[1]


print("uvloop", uvloop.__version__)
for name, new_loop in (("asyncio", asyncio.new_event_loop), ("uvloop", uvloop.new_event_loop)):
    loop = new_loop()
    by_address, by_socket = loop.run_until_complete(connect())
    loop.close()
    print(f"{name}: by its address: {by_address}; a connected socket: {by_socket}")
    assert by_socket == "connected"
    assert (by_address == "connected") == (name == "asyncio"), "uvloop connects to abstract addresses now"
PY
"$work/venv/bin/python" "$work/abstract.py"
