"""Host arrays reach the device as they are, also several in one copy."""

import numpy as np
import pytest
import torch

from engine.transfers import upload_shared, upload_together


def test_arrays_arrive_together_with_their_types():
    arrays = [
        np.arange(3),
        np.broadcast_to(np.arange(5), (3, 5)),
        np.arange(8)[::2],
        np.arange(6).reshape(2, 3).T,
        np.zeros((0, 3), np.int32),
        np.arange(5, dtype=np.float32),
        np.array([True, False, True]),
        np.arange(9, dtype=np.int32).reshape(3, 3),
    ]
    for tensor, array in zip(upload_together(arrays, torch.device("cpu")), arrays, strict=True):
        assert tensor.is_contiguous() and tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


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
