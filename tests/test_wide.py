"""The part of a wide table of tests that ``make test`` runs has each combination of values that it must."""

from itertools import combinations, product

import pytest

from tests.wide import cover

AXES = {"size": range(7), "rows": (1, 2, 17), "zeros": (True, False), "run": ("a", "b")}
ROWS = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


@pytest.mark.parametrize(("strength", "most"), [(1, 7), (2, 24), (4, len(ROWS))])
def test_every_combination_of_values_is_kept(strength, most):
    kept = cover(ROWS, strength)
    assert len(kept) <= most
    for names in combinations(AXES, strength):
        found = {tuple(ROWS[number][name] for name in names) for number in kept}
        assert found == set(product(*(AXES[name] for name in names)))


def test_values_are_shared_evenly():
    """A column of few values beside a long one: each of them is with about as many values of the other."""
    rows = [{"field": field, "kind": kind} for kind in range(3) for field in range(12)]
    kinds = [rows[number]["kind"] for number in cover(rows, 1)]
    assert sorted(map(kinds.count, range(3))) == [4, 4, 4]
