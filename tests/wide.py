"""Chooses the part of wide tables of tests that ``make test`` runs; ``make test-wide`` runs them whole.

A test with the mark ``wide`` is left out. Of a test with the mark ``covering(n)`` enough cases are kept to
have each combination of values of ``n`` parameters: with 1 each value, with 2 each pair of values. Most
faults need no more than two values together. A test whose body has a table of its own takes the fixture
``wide``. On a machine with a GPU all cases run: there kernels take little time. Without one, the first case
of each test that needs a GPU is kept, and says so: more than a thousand would only be skipped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import settings

#: Parameters of which a value may be skipped on this machine: each of their values is covered by itself.
_APART = ("dtype",)
#: Values of the fixture ``dtype`` of kernels' tests that need a GPU: the interpreter computes in float32.
ONLY_ON_GPU = ("bfloat16", "float16")
#: Types of values that are compared: a table may have rows of several parameters.
_PLAIN = (str, int, float, tuple, type(None))


def run_whole(config: pytest.Config) -> bool:
    """Return whether all cases of all tables run."""
    return config.getoption("--wide") or torch.cuda.is_available()


def examples(most: int, wide: bool) -> settings:
    """Settings of a Hypothesis test of ``most`` examples, or a quarter of them."""
    return settings(max_examples=most if wide else most // 4)


def leave_out(items: list[pytest.Item], config: pytest.Config) -> None:
    """Deselect the tests that only ``--wide`` runs."""
    tables: dict[Any, list[pytest.Item]] = defaultdict(list)
    out = {item for item in items if item.get_closest_marker("wide")}
    skipped: set[str] = set()
    for item in items:
        if item not in out and needs_gpu(item):
            name = item.nodeid.split("[")[0]
            if name in skipped:
                out.add(item)
            skipped.add(name)
    for item in items:
        mark = item.get_closest_marker("covering")
        if mark is not None and hasattr(item, "callspec"):
            apart = tuple(_values(item).get(name) for name in _APART)
            tables[item.nodeid.split("[")[0], apart, *mark.args].append(item)
    for (_, _, strength), table in tables.items():
        kept = cover([_values(item) for item in table], strength)
        out.update(item for number, item in enumerate(table) if number not in kept)
    if out:
        config.hook.pytest_deselected(items=[item for item in items if item in out])
        items[:] = [item for item in items if item not in out]


def needs_gpu(item: pytest.Item) -> bool:
    """Return whether a test is skipped where there is no GPU: it is marked, or needs a Hopper GPU, or the
    kernels of a dtype that the interpreter does not compute in."""
    fixtures = getattr(item, "fixturenames", ())
    params = item.callspec.params if hasattr(item, "callspec") else {}
    # A parameter of that name is a value, not the GPU.
    if item.get_closest_marker("gpu") is not None or ("hopper" in fixtures and "hopper" not in params):
        return True
    dtype = params.get("dtype")
    return isinstance(dtype, str) and dtype in ONLY_ON_GPU and "device" in fixtures


def _values(item: pytest.Item) -> dict[str, Any]:
    """For each parameter of a test its value, or the identity of a value that is no plain data."""
    found = item.callspec.params
    return {name: found[name] if isinstance(found[name], _PLAIN) else id(found[name]) for name in found}


def cover(rows: Sequence[dict[str, Any]], strength: int) -> set[int]:
    """Return numbers of rows that together have each combination of values of ``strength`` columns.

    Rows are taken greedily: those that add most combinations, and of these one whose values were taken least.
    """
    numbers: dict[Any, int] = {}
    combined = []
    for row in rows:
        found = combinations(sorted(row.items()), min(strength, len(row)))
        combined.append(sum(1 << numbers.setdefault(each, len(numbers)) for each in found))
    missing, kept = (1 << len(numbers)) - 1, set()
    taken: Counter[Any] = Counter()
    while missing:
        added = [(row & missing).bit_count() for row in combined]
        most = max(added)
        best = min(
            (number for number, count in enumerate(added) if count == most),
            key=lambda row: sum(taken[each] for each in rows[row].items()),
        )
        kept.add(best)
        missing &= ~combined[best]
        taken.update(rows[best].items())
    return kept
