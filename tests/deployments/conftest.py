"""The application in this process, and its clients."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio

from deployments.config import AppConfig
from deployments.in_process import LocalApplication, LocalModel
from tests.deployments.asgi import AppTransport
from tests.serving import serve_files, tested_args, wait_until


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All coroutines of this folder run in one event loop, as in a server: connections are kept for it."""
    for item in items:
        if Path(__file__).parent in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(autouse=True)
def no_field_was_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on which unknown fields the tests before it in its process have sent."""
    monkeypatch.setattr("deployments.unknown_fields._logged", set())


@dataclass(frozen=True)
class Running:
    """The application in this process.

    Attributes:
        pictures: a folder from which it may fetch, under the address ``site``.
    """

    app: LocalApplication
    pictures: Path
    site: str

    @property
    def pocket(self) -> LocalModel:
        return self.app.models["pocket"]

    async def wait_until_idle(self) -> None:
        """Until no engine has a request; fails if an idle one still holds memory."""
        for model in self.app.models.values():
            await wait_until(model.language_model.is_idle)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running(tmp_path_factory) -> AsyncIterator[Running]:
    """``serve_config.yaml``'s application with a second model that makes embeddings."""
    pictures = tmp_path_factory.mktemp("pictures")
    # An address of its own: the machine's usual addresses stay forbidden.
    with serve_files(pictures, "127.0.0.2") as site:
        app = LocalApplication(AppConfig.model_validate(tested_args(site)))
        yield Running(app, pictures, site)
        await app.close()


@pytest.fixture
def http(running: Running) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=AppTransport(running.app.api), base_url="http://test", timeout=60)


@pytest.fixture
def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)


@pytest_asyncio.fixture(loop_scope="session")
async def idle_afterwards(running: Running) -> AsyncIterator[None]:
    """After the test nothing of its requests is left in an engine."""
    yield
    await running.wait_until_idle()
