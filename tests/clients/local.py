"""The application at an address of this process, for clients here and in other processes."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from deployments.config import AppConfig
from deployments.in_process import LocalApplication
from tests.clients.cases import EMBEDDER, MODEL
from tests.serving import app_args


def served_args() -> dict[str, Any]:
    """The shipped configuration with ``pocket-tools`` in place of ``pocket``, and an embedding model."""
    args = app_args()
    args["models"][0]["name"] = MODEL
    args["models"][0]["engine"]["model"] = f"models/{MODEL}"
    engine = {
        "model": "models/pocket-embed",
        "task": "embed",
        "max_model_len": 512,
        "kv_cache_bytes": 16 << 20,
    }
    args["models"].append({"name": EMBEDDER, "engine": engine})
    return args


@contextmanager
def served() -> Iterator[str]:
    """Serve :func:`served_args` on a free port meanwhile, without Ray; the address."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server: uvicorn.Server | None = None

        async def serve() -> None:
            nonlocal server
            application = LocalApplication(AppConfig.model_validate(served_args()))
            server = uvicorn.Server(uvicorn.Config(application, log_level="warning"))
            ready.set()
            await server.serve(sockets=[bound])
            await application.close()

        def run() -> None:
            try:
                loop.run_until_complete(serve())
            finally:
                ready.set()
                loop.close()

        # Connections wait in the socket's queue until the server takes them.
        bound.listen(64)
        thread = threading.Thread(target=run, name="served", daemon=True)
        thread.start()
        ready.wait()
        assert server is not None, "the application could not be loaded"
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
