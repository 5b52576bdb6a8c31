#!/usr/bin/env bash
# gRPC for Python: a stream that ends without a message may lose the metadata that its server has sent.
#
# Ray Serve 2.60 with RAY_SERVE_THROUGHPUT_OPTIMIZED=1 calls replicas by gRPC. A replica says in the initial metadata that
# it accepts a call; without that the caller gets RuntimeError("Unexpected error (StatusCode.OK): ."). For calls that
# are refused Serve adds an empty message, for accepted ones it doesn't.
# Expected: metadata that was sent before a stream ended well is there, whatever the stream brought.
# If the client is busy for some milliseconds, the end may be handled first, and then the metadata is empty. With one
# message in the stream it never was.
# Why it matters to a server of vision-language models: a generator behind a handle of Ray Serve that happens to yield
# nothing (its tokens go another way, or there are none) fails now and then, on busy machines, though it has succeeded.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q grpcio==1.85.1
cat > "$work/probe.py" <<'PY'
import asyncio
import collections
import multiprocessing
import time

import grpc
from grpc import aio


async def silent(request, context):
    await context.send_initial_metadata((("accepted", "1"),))
    return
    yield


async def one(request, context):
    await context.send_initial_metadata((("accepted", "1"),))
    yield b""


def serve(pipe):
    async def run():
        server = aio.server()
        methods = {"silent": silent, "one": one}
        handlers = {name: grpc.unary_stream_rpc_method_handler(method) for name, method in methods.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send(port)
        await server.wait_for_termination()

    asyncio.run(run())


async def read(call):
    async for _ in call:
        pass


async def ask(channel, name, found):
    call = channel.unary_stream(f"/s/{name}")(b"")
    reader = asyncio.ensure_future(read(call))
    await call.wait_for_connection()
    metadata = await call.initial_metadata()
    found["accepted" if metadata.get("accepted") else f"lost, {await call.code()}"] += 1
    await reader


async def busy():
    while True:
        time.sleep(0.003)
        await asyncio.sleep(0.002)


async def main(port):
    results = {}
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        other = asyncio.ensure_future(busy())
        for name in ("silent", "one"):
            results[name] = collections.Counter()
            for _ in range(12):
                await asyncio.gather(*(ask(channel, name, results[name]) for _ in range(60)))
            print(name, dict(results[name]), flush=True)
        other.cancel()
    assert results["one"]["accepted"] == 720, "metadata is lost with a message, too"
    assert results["silent"]["accepted"] < 720, "metadata arrives now"


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    print("grpcio", grpc.__version__)
    asyncio.run(main(ours.recv()))
    server.terminate()
PY
"$work/venv/bin/python" "$work/probe.py"
