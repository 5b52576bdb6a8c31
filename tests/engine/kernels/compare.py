"""Tolerances of kernels against their references."""

import torch

#: Relative error in the Frobenius norm.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close(result: torch.Tensor, expected: torch.Tensor, *, tolerance: float = 0.0) -> None:
    """Compare a kernel's result with ``expected``, which may have higher precision.

    Args:
        tolerance: relative error that is expected of this problem, where it exceeds that of the dtype.
    """
    assert not result.isnan().any(), "an element was not written, or the kernel read what it must not read"
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    assert error <= max(tolerance, TOLERANCE[result.dtype]), f"relative error {error:.2e}"
