"""Fixtures that every test shares."""

import os

# Several threads are slower than one with tensors as small as those of tests, and far slower if two workers
# share the cores. torch reads this when it is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

from tests.serving import Served, SharedApplication
from tests.workers import assign_groups, starts_processes, uses_application

# Triton reads this when a kernel is decorated, so it must be set before any kernel file is imported. Tensors
# on a CPU go to the torch references all the same; only the tests of kernels call the Triton code on them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ray reads this when it is imported. A cluster on one machine asks for a token by default, but a process that
# connects to one sends a token only if this is set.
os.environ.setdefault("RAY_AUTH_MODE", "token")


# First, because xdist's own hook reads the groups, and is called before those of conftest files otherwise.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Give tests that start processes more time, and share all tests between workers, if there are any."""
    for item in items:
        if starts_processes(item) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
    # Together, so that the application starts once.
    items.sort(key=uses_application)
    if hasattr(config, "workerinput"):
        assign_groups(items)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the application after the last test that uses it: even idle, it takes a quarter of a core."""
    shared = getattr(item, "funcargs", {}).get("shared_application")
    if shared is not None and not (nextitem and uses_application(nextitem)):
        shared.close()


@pytest.fixture(scope="session")
def shared_application(tmp_path_factory) -> Iterator[SharedApplication]:
    shared = SharedApplication(lambda: tmp_path_factory.mktemp("served"))
    yield shared
    shared.close()


@pytest.fixture
def served(shared_application: SharedApplication) -> Served:
    """The application as ``make serve`` runs it."""
    return shared_application.get()


@pytest.fixture
def ray_client(served: Served):
    from openai import OpenAI

    return OpenAI(base_url=served.base_url, api_key="none", max_retries=0)


@pytest.fixture
def ray_idle_afterwards(served: Served) -> Iterator[None]:
    """After the test nothing of its requests is left in the engine."""
    yield
    served.wait_until_idle()
