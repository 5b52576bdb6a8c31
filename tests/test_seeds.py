"""Random tensors of a test are the same, whatever runs before it."""

import pytest
import torch


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return torch.rand(4)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("drawn_before", ["its fixture is set up for it", "its fixture exists already"])
def test_a_test_draws_the_same_numbers(drawn_before):
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(0)))
