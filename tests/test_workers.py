"""How ``make test`` shares the tests between its workers."""

import pytest

from tests.workers import group_of


def test_xdist_knows_the_group_of_each_test(request):
    """xdist reads the marks before most hooks run, and hands out single tests if it finds none."""
    items = request.session.items
    if not hasattr(request.config, "workerinput"):
        pytest.skip("no workers: make test WORKERS=0")
    for item in items:
        name, _, group = item.nodeid.rpartition("@")
        assert group == group_of(item), name
