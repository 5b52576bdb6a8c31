"""Object references: none outlives its request."""

import re

import pytest

from tests.deployments.pictures import ask, circle
from tests.serving import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("idle_afterwards")]


def stored_objects() -> int:
    """Objects in the object stores of the cluster."""
    from ray._private.internal_api import memory_summary

    found = re.search(r"Plasma memory usage \d+ MiB, (\d+) objects", memory_summary(stats_only=True))
    assert found is not None
    return int(found[1])


def test_pixels_and_embeddings_leave_the_object_store(client):
    def once(width: int) -> None:
        client.chat.completions.create(
            model="pocket",
            messages=ask("What color is the circle?", circle("red", (width, 160))),
            max_tokens=4,
        )

    once(200)
    before = stored_objects()
    for width in range(201, 213):
        once(width)
    # Counting is distributed: owners hear of the last use a moment later.
    wait_for(lambda: stored_objects() <= before)
