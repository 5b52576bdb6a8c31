"""One tiny checkpoint of each family for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.engine.families.case import FamilyCase
from tests.engine.families.made import Made


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Several are slower with matrices as small as these, and far slower on cores that others use too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable[..., Made]:
    """The checkpoint of a case, as Transformers saves it or as on the hub; made at its first use.

    Only the last case that was asked for keeps an engine.
    """
    root, found = tmp_path_factory.mktemp("families"), {}

    def checkpoint(case: FamilyCase, *, hub: bool = False) -> Made:
        key = case.name, hub
        for (name, _), other in found.items():
            if name != case.name:
                other.release()
        if key not in found:
            found[key] = Made(case, root / f"{case.name} {'hub' if hub else 'saved'}", hub)
        return found[key]

    return checkpoint
