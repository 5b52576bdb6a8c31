"""The server that clients speak to.

``make test-clients`` starts it: there clients have environments of their own, without this project's
packages. Clients that are installed beside the project find it in this process.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

URL = "SIGHTLINE_URL"


@pytest.fixture(scope="session")
def root() -> Iterator[str]:
    """The server's address, without ``/v1``."""
    if URL in os.environ:
        yield os.environ[URL].rstrip("/")
        return
    if find_spec("torch") is None or find_spec("uvicorn") is None:
        pytest.skip(f"needs {URL}, the address of a served pocket-tools; see make test-clients")
    from tests.clients.local import served

    with served() as address:
        yield address


@pytest.fixture(scope="session")
def base_url(root: str) -> str:
    return f"{root}/v1"
