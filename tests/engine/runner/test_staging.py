"""Host arrays reach the device together, each as if it had come alone."""

import numpy as np
import pytest
import torch

from engine.runner.staging import upload_shared, upload_together


def test_arrays_arrive_with_their_shapes_where_kernels_expect_them():
    arrays = {
        "odd": np.arange(3),
        "axes": np.broadcast_to(np.arange(5, dtype=np.int32), (3, 5)),
        "none": np.zeros(0, np.int64),
        "no rows": np.zeros((3, 0), np.int64),
        "even": np.arange(8)[::2],
        "turned": np.arange(6).reshape(2, 3).T,
        "flags": np.array([True, False, True]),
    }
    found = upload_together(list(arrays.values()), torch.device("cpu"))
    assert len(found) == len(arrays)
    for tensor, array in zip(found, arrays.values(), strict=True):
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), array)
        # Kernels are compiled anew for pointers that aren't.
        assert tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


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
