"""The served application in this process, for clients that are installed beside the project."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from deployments.config import AppConfig
from deployments.in_process import LocalApplication
from tests.clients.run import served_args


@contextmanager
def served_here() -> Iterator[str]:
    """Serve what :func:`tests.clients.run.served` serves, without Ray; the address."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server: uvicorn.Server | None = None

        async def serve() -> None:
            nonlocal server
            application = LocalApplication(AppConfig.model_validate(served_args()))
            server = uvicorn.Server(uvicorn.Config(application.api, log_level="warning"))
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
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)
