"""Fixtures of the tests of ``k8s/``."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that start whole pods unless they are asked for."""
    if os.environ.get("SIGHTLINE_PODS") != "1":
        for item in items:
            if item.get_closest_marker("pods"):
                item.add_marker(pytest.mark.skip(reason="starts pods for a minute: make test-k8s"))
