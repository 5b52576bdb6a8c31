"""Fixtures of the tests of ``k8s/``."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.k8s.demo import Deployed, demo_group, deployed_demo


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that start whole pods unless they are asked for."""
    if os.environ.get("SIGHTLINE_PODS") != "1":
        for item in items:
            if item.get_closest_marker("pods"):
                item.add_marker(pytest.mark.skip(reason="starts pods for minutes: make test-k8s"))


@pytest.fixture(scope="session")
def deployed(tmp_path_factory) -> Iterator[Deployed]:
    """The demo with an ingress on each of two workers."""
    with deployed_demo(tmp_path_factory.mktemp("pods")) as found:
        yield found


@pytest.fixture(scope="session")
def group() -> dict[str, Any]:
    """The group of the demo's workers."""
    return demo_group()
