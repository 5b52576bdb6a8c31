#!/usr/bin/env bash
# uvloop: writing to a connection that the other end has closed raises an exception; asyncio drops what is written.
#
# Expected: transport.write() behaves as asyncio's: once the connection has ended, data are dropped, at most with a
# warning in the log.
# What happens: uvloop's write raises RuntimeError, "unable to perform operation on ...; the handler is closed".
# Why it matters to a server of vision-language models: Ray Serve's replicas run uvloop, tests mostly run asyncio's loop.
# A process that says "give this answer up" on a connection that ended a moment ago gets a RuntimeError in place of the
# error that it was about to report: a lost stage, which is tried again, becomes an internal error, and a cancellation is
# lost. Ask whether the connection has ended before each write.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q uvloop==0.23.0
cat > "$work/written.py" <<'PY'
import asyncio

import uvloop


class Client(asyncio.Protocol):
    def __init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)


async def written() -> str:
    """What comes of writing to a connection that the server has closed."""
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    transport, client = await loop.create_connection(Client, *server.sockets[0].getsockname())
    await asyncio.wait_for(client.ended, 10)
    try:
        transport.write(b"give up")
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    finally:
        server.close()
    return "dropped"


print("uvloop", uvloop.__version__)
found = {}
for name, new_loop in (("asyncio", asyncio.new_event_loop), ("uvloop", uvloop.new_event_loop)):
    loop = new_loop()
    found[name] = loop.run_until_complete(written())
    loop.close()
    print(f"{name}: {found[name].split(' at 0x')[0]}")
assert found["asyncio"] == "dropped"
assert found["uvloop"].startswith("RuntimeError"), "uvloop drops what is written behind the end now"
PY
"$work/venv/bin/python" "$work/written.py"
