"""Host arrays reach the device together, each as if it had come alone."""

import numpy as np
import torch

from engine.runner.staging import upload_together


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
