"""The application at a real address, and a real browser."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import pytest_asyncio
import uvicorn

from deployments.api import create_api
from deployments.config import IngressConfig
from tests.serving import free_port, wait_until

#: Names of the browser as Debian and others install it.
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def browser() -> AsyncIterator:
    """A headless Chromium, which ends after this folder: even idle it takes part of a core."""
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    # Deadlines for conditions, on slow machines too.
    playwright.expect.set_options(timeout=60_000)
    async with playwright.async_playwright() as drivers:
        # A browser of the root user can't have a sandbox.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = await drivers.chromium.launch(executable_path=found, args=options, timeout=120_000)
        yield browser
        await browser.close()


class QuietServer(uvicorn.Server):
    """A server that leaves SIGTERM and SIGINT to the process: uvicorn would take them for its own end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(api) -> tuple[QuietServer, asyncio.Task, str]:
    port = free_port()
    server = QuietServer(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="warning"))
    task = asyncio.ensure_future(server.serve())
    await wait_until(lambda: server.started or task.done())
    return server, task, f"http://127.0.0.1:{port}/"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site(running) -> AsyncIterator[str]:
    """The address of the application."""
    server, task, address = await _serve(running.app.api)
    yield address
    server.should_exit = True
    await task


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def guarded_site(running) -> AsyncIterator[str]:
    """The page behind the API key ``secret``."""
    config = IngressConfig(keys=[{"name": "one", "key": "secret"}])
    server, task, address = await _serve(create_api(config, running.app.api.state.pipelines))
    yield address
    server.should_exit = True
    await task
