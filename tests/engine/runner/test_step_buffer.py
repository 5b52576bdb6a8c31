"""The arrays of a step reach the device in one copy, each as if it had come alone."""

import numpy as np
import pytest
import torch

from engine.runner.step_buffer import StepBuffer

OTHERS = {
    "odd": np.arange(3),
    "axes": np.broadcast_to(np.arange(5), (3, 5)),
    "every second": np.arange(8)[::2],
    "turned": np.arange(6).reshape(2, 3).T,
    "three axes": np.arange(24).reshape(2, 3, 4),
}


@pytest.mark.parametrize("count", [0, 9, 10])
def test_the_arrays_of_a_step_arrive_with_their_shapes(count):
    buffer = StepBuffer(10, torch.device("cpu"))
    front, numbers = buffer.numbers[:10], np.arange(100, 100 + count)
    front.fill_(-1)
    # Some of them are more than there is room for.
    for others in ({}, OTHERS, {"first": np.arange(7), "long": np.arange(200_000).reshape(2, -1)}):
        found = buffer.send([numbers[:4], numbers[4:].reshape(-1, 1)] if count else [], others)
        assert front[:count].tolist() == numbers.tolist()
        assert count or front.tolist() == [-1] * 10, "inputs must stay"
        assert found.keys() == others.keys()
        for name, array in others.items():
            np.testing.assert_array_equal(found[name].numpy(), array)
            assert found[name].is_contiguous()


def test_captured_passes_read_inputs_where_they_were():
    buffer = StepBuffer(10, torch.device("cpu"))
    front = buffer.numbers[:10]
    for step in range(3):
        buffer.send([np.arange(step, step + 10)], {"tables": np.arange(6).reshape(2, 3)})
        assert front.tolist() == [*range(step, step + 10)]
