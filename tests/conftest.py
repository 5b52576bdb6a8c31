"""Fixtures that every test shares."""

import gc
import os

# Several threads are slower than one with tensors as small as those of tests, and far slower if two workers
# share the cores. torch reads this when it is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis
import pytest
import torch

import tests
from benchmarks.orphans import end_with_this_process
from tests.serving import UNDER_LOAD, Served, SharedApplication
from tests.wide import leave_out, run_whole
from tests.workers import APPLICATIONS, application_of, assign_groups, give_way, starts_processes

# By itself, the CPU's generator takes a hundredth of the time.
_seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed

# Triton reads this when a kernel is decorated, so it must be set before any kernel file is imported. Tensors
# on a CPU go to the torch references all the same; only the tests of kernels call the Triton code on them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# With a heap as large as that of the tests the collector took a tenth of the time.
gc.set_threshold(20_000, 10, 10)

# Ray reads this when it is imported. A cluster on one machine asks for a token by default, but a process that
# connects to one sends a token only if this is set.
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Examples are the same in each run, and no test fails because it, or making them, is slow on a busy machine.
hypothesis.settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wide", action="store_true", help="run wide tables of tests whole, not only a part")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Spare the collector the modules that are imported and the tests that are found: all of it stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def thawed() -> Iterator[None]:
    """Leave all objects to the collector for the time of a test. Its full collections are slow then."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    tests.ends_at_once = hasattr(config, "workerinput")
    # The workers too: if one of them dies, pytest goes on with another.
    end_with_this_process()


# First, because xdist's own hook reads the groups, and is called before those of conftest files otherwise.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Give tests that start processes more time, and share all tests between workers, if there are any."""
    if not run_whole(config):
        leave_out(items, config)
    for item in items:
        if starts_processes(item) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
        if application_of(item) == "served_under_load" and "CHAOS_SECONDS" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="runs with CHAOS_SECONDS, as by make chaos"))
    # Together, so that each application starts once.
    items.sort(key=lambda item: ("", *APPLICATIONS).index(application_of(item)))
    if hasattr(config, "workerinput"):
        assign_groups(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have fixtures draw the same random tensors whatever test ran before. Leave the cores to the tests that
    start processes, if those run in another worker."""
    _seed(0)
    if hasattr(item.config, "workerinput"):
        give_way(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Have the test draw the same random tensors whatever its fixtures drew: those of a module are set up for
    one of its tests only."""
    _seed(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End an application after the last test that uses it: even idle, it takes a quarter of a core."""
    name, shared = application_of(item), getattr(item, "funcargs", {}).get("shared_applications")
    if shared is not None and name and not (nextitem and application_of(nextitem) == name):
        shared[name].close()


def _patient(args: dict[str, Any]) -> None:
    """However long a slow machine takes to replace a process or to fetch an image: nothing is given up."""
    args["ingress"]["replay"] = {"max_losses": 1000, "patience_s": 600}
    args["fetch"]["timeout"] = 300


def _two_ranks(args: dict[str, Any]) -> None:
    """The second model's language model has the encoder, and is two processes, of which tests kill one. Ranks
    of the first would take several times as long for each of its tokens: they share the cores with all other
    processes."""
    _patient(args)
    vectors = args["models"][1]
    vectors["engine"]["tensor_parallel_size"] = 2
    vectors["language_model"] = {"env": {"OMP_NUM_THREADS": "1"}}
    vectors["encoder"] = {"with_language_model": True}


def _two_ingresses(args: dict[str, Any]) -> None:
    _patient(args)
    args["ingress"]["num_replicas"] = 2


@pytest.fixture(scope="session")
def shared_applications(tmp_path_factory) -> Iterator[Mapping[str, SharedApplication]]:
    """The applications that tests share, by the fixture that gives them."""
    options: dict[str, dict[str, Any]] = {
        "served": {"change": _two_ranks},
        "served_under_load": {"change": _two_ingresses, "environment": UNDER_LOAD, "connect": False},
    }
    shared = {
        name: SharedApplication(lambda name=name: tmp_path_factory.mktemp(name), **options[name])
        for name in APPLICATIONS
    }
    yield shared
    for each in shared.values():
        each.close()


@pytest.fixture(scope="session")
def wide(pytestconfig: pytest.Config) -> bool:
    """True if tables of tests run whole, as by ``make test-wide``."""
    return run_whole(pytestconfig)


@pytest.fixture
def served(shared_applications: Mapping[str, SharedApplication]) -> Served:
    """The application as ``make serve`` runs it, and a second model, whose language model has two ranks."""
    return shared_applications["served"].get()


@pytest.fixture
def served_under_load(shared_applications: Mapping[str, SharedApplication]) -> Served:
    """The application as the README says for load, behind HAProxy, with two ingress replicas. This process is
    not connected to its cluster."""
    return shared_applications["served_under_load"].get()


@pytest.fixture
def ray_client(served: Served):
    from openai import OpenAI

    return OpenAI(base_url=served.base_url, api_key="none", max_retries=0)


@pytest.fixture
def ray_idle_afterwards(served: Served) -> Iterator[None]:
    """After the test nothing of its requests is left in the engine."""
    yield
    served.wait_until_idle()
