"""The part of a wide table of tests that ``make test`` runs has each combination of values that it must."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch

from tests.wide import cover, leave_out

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


class Item:
    """A test with a mark and parameters."""

    def __init__(
        self, name: str, mark: pytest.Mark | None = None, fixtures: tuple[str, ...] = (), **params: object
    ) -> None:
        self.nodeid, self._mark, self.fixturenames = f"{name}[{params}]", mark, fixtures
        if params:
            self.callspec = SimpleNamespace(params=params)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self._mark if self._mark is not None and self._mark.name == name else None


def test_what_is_left_out():
    """Tests with the mark ``wide``, and cases that add nothing; each ``dtype`` is covered by itself."""
    mark = pytest.mark.covering(1).mark
    kept = [Item("plain"), Item("no parameters", mark), Item("plain", size=1)]
    table = [
        Item("table", mark, size=size, dtype=dtype) for dtype in ("float32", "bfloat16") for size in (1, 2)
    ]
    others = [Item("other", mark, size=size, run=object) for size in (1, 2)]
    same = Item("other", mark, size=2, run=object)
    items = [*kept, Item("wide", pytest.mark.wide.mark), *table, *others, same]
    assert names_left_out(items) == ["wide", "other"]
    assert items == [*kept, *table, *others]


def names_left_out(items: list[Item]) -> list[str]:
    """Leave tests out, and return their names."""
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    leave_out(items, SimpleNamespace(hook=hook))
    return [item.nodeid.split("[")[0] for item in left_out]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU all cases run")
def test_one_case_of_a_test_says_that_there_is_no_gpu():
    marked = [Item("marked", pytest.mark.gpu.mark, size=size) for size in range(3)]
    hopper = [Item("hopper", None, ("hopper",), size=size) for size in range(2)]
    names, fixtures = ("float32", "bfloat16", "float16"), ("device", "dtype")
    dtypes = [Item("dtype", None, fixtures, dtype=name, size=n) for name in names for n in range(2)]
    other = [Item("other", None, ("dtype",), dtype=name) for name in names]
    values = [Item("value", None, ("device",), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    values += [Item("value of that name", None, ("hopper",), hopper=value) for value in (True, False)]
    items = [*marked, *hopper, *dtypes, *other, *values]
    assert names_left_out(items) == ["marked"] * 2 + ["hopper"] + ["dtype"] * 3
    assert items == [marked[0], hopper[0], *dtypes[:3], *other, *values]
