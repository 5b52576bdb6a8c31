"""The server that clients speak to, which ``make test-clients`` starts.

Clients have environments of their own, without this project's packages.
"""

import os

import pytest

URL = "SIGHTLINE_URL"


@pytest.fixture(scope="session")
def root() -> str:
    """The server's address, without ``/v1``."""
    if URL not in os.environ:
        pytest.skip(f"needs {URL}, the address of a served pocket-tools; see make test-clients")
    return os.environ[URL].rstrip("/")


@pytest.fixture(scope="session")
def base_url(root: str) -> str:
    return f"{root}/v1"
