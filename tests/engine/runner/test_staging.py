"""Host arrays reach the device together, each as if it had come alone."""

import numpy as np
import pytest
import torch

from engine.runner.staging import StepBuffer, upload_shared, upload_together

OTHERS = {
    "odd": np.arange(3),
    "axes": np.broadcast_to(np.arange(5), (3, 5)),
    "every second": np.arange(8)[::2],
    "turned": np.arange(6).reshape(2, 3).T,
    "three axes": np.arange(24).reshape(2, 3, 4),
}


def test_arrays_arrive_together_with_their_types():
    arrays = [
        *OTHERS.values(),
        np.zeros((0, 3), np.int32),
        np.arange(5, dtype=np.float32),
        np.array([True, False, True]),
        np.arange(9, dtype=np.int32).reshape(3, 3),
    ]
    for tensor, array in zip(upload_together(arrays, torch.device("cpu")), arrays, strict=True):
        assert tensor.is_contiguous() and tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


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


def test_a_shared_array_arrives_as_a_copy():
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    array.flags.writeable = False
    found = upload_shared(array, torch.device("cpu"))
    assert found.dtype == torch.int16
    np.testing.assert_array_equal(found.numpy(), array)
    found.zero_()
    assert array.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no queue of work")
def test_a_shared_array_does_not_wait_for_work_that_is_enqueued():
    device, array = torch.device("cuda"), np.random.default_rng(0).integers(0, 99, (1000, 1536), np.int16)
    upload_shared(array, device)
    # A second or two.
    torch.cuda._sleep(2_000_000_000)
    before = torch.cuda.Event()
    before.record()
    found = upload_shared(array, device)
    assert not before.query()
    np.testing.assert_array_equal(found.cpu().numpy(), array)
