"""The arrays of a step reach the device in one copy, each as if it had come alone."""

import numpy as np
import pytest
import torch

from engine.runner.step_buffer import MOST_CHANGES, StepBuffer

OTHERS = {
    "odd": np.arange(3),
    "axes": np.broadcast_to(np.arange(5), (3, 5)),
    "every second": np.arange(8)[::2],
    "turned": np.arange(6).reshape(2, 3).T,
    "three axes": np.arange(24).reshape(2, 3, 4),
}


CPU = torch.device("cpu")
NONE = np.empty((2, 0), np.int64)


@pytest.mark.parametrize("count", [0, 9, 10])
@pytest.mark.parametrize("changed", [0, 3, MOST_CHANGES])
def test_the_arrays_of_a_step_arrive_with_their_shapes(count, changed):
    buffer = StepBuffer(10, 4, CPU)
    front, numbers = buffer.numbers[:10], np.arange(100, 100 + count)
    changes = np.arange(2 * changed).reshape(2, -1)
    memory = buffer.host_memory()
    front.fill_(-1)
    # Some of them are more than there is room for.
    for others in ({}, OTHERS, {"first": np.arange(7), "long": np.arange(200_000).reshape(2, -1)}):
        found = buffer.send(memory, changes, numbers, others)
        # The memory of the host may be written again.
        memory.given.fill_(-2)
        assert front[:count].tolist() == numbers.tolist()
        assert count or front.tolist() == [-1] * 10, "inputs must stay"
        if count or changed or others:
            assert buffer.changes[-1] == changed
            first = len(buffer.changes) - 1 - 2 * changed
            np.testing.assert_array_equal(buffer.changes[first:-1].numpy(), changes.reshape(-1))
        assert found.keys() == others.keys()
        for name, array in others.items():
            np.testing.assert_array_equal(found[name].numpy(), array)
            assert found[name].is_contiguous()


def test_captured_passes_read_inputs_where_they_were():
    buffer = StepBuffer(10, 4, CPU)
    front, changes = buffer.numbers[:10], buffer.changes
    for step in range(3):
        memory = buffer.host_memory()
        numbers = np.arange(step, step + 10)
        buffer.send(memory, NONE if step == 1 else np.full((2, step), 7), numbers, {"some": np.arange(6)})
        assert front.tolist() == [*range(step, step + 10)]
        assert changes[-1] == (0 if step == 1 else step), "changes must not be written twice"


def test_memory_of_the_host_is_used_again_once_it_is_given_back():
    buffer = StepBuffer(10, 4, CPU)
    first, second = (buffer.host_memory() for _ in range(2))
    assert first is not second
    buffer.give_back(first)
    assert buffer.host_memory() is first
