"""The device's state of running requests."""

import pytest
import torch

from engine.runner.device_state import DeviceState


@pytest.fixture
def state():
    state = DeviceState(num_slots=3, num_groups=2, max_blocks=5, block_size=4, device=torch.device("cpu"))
    state.block_tables.copy_(torch.arange(2 * 4 * 5).view(2, 4, 5))
    state.length.copy_(torch.tensor([0, 7, 18, 0]))
    return state


def test_each_group_of_layers_has_its_own_places(state):
    slots = torch.tensor([2, 1, 3])
    found = state.decode_inputs(slots)
    for group in range(2):
        alone = DeviceState(3, 1, 5, 4, torch.device("cpu"))
        alone.block_tables.copy_(state.block_tables[group : group + 1])
        alone.length.copy_(state.length)
        expected = alone.decode_inputs(slots)
        assert torch.equal(found.tables[group], expected.tables[0])
        assert torch.equal(found.kv_slots[group], expected.kv_slots[0])
