"""How far a kernel may be from its reference."""

import torch

#: Relative error in the Frobenius norm.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """``wanted`` may be of higher precision."""
    assert not found.isnan().any(), "an element was not written, or read what it must not"
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= TOLERANCE[found.dtype], f"relative error {error:.2e}"
