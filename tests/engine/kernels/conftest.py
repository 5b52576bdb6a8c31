from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction, InterpreterOptions, interpreter_builder

from tests.wide import ONLY_ON_GPU


@pytest.fixture
def device() -> torch.device:
    """Return the GPU if there is one, else the CPU, where kernels run in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    """Return the Hopper GPU, which kernels in Gluon need: it has no interpreter."""
    if device.type == "cpu" or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the kernel is for Hopper GPUs, and Gluon has no interpreter")
    return device


@pytest.fixture(params=["float32", *ONLY_ON_GPU])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if request.param in ONLY_ON_GPU and device.type == "cpu":
        pytest.skip("kernels of 16 bits run on a GPU only: the interpreter computes in float32")
    return getattr(torch, request.param)


@pytest.fixture(autouse=True, scope="session")
def interpreter_without_needless_work() -> Iterator[None]:
    """Save two thirds of the interpreter's time.

    Each launch patches ``triton.language`` and restores it. Each call of a device function patches it again,
    and restores nothing: from the second call of a function on, that changes nothing.
    """
    first, known = InterpretedFunction.__call__, set()

    def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if self.fn in known:
            return self.rewrite()(*args, **kwargs)
        known.add(self.fn)
        return first(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        # Unless kernels are debugged, whether integers overflow is computed and not looked at.
        patch.setattr(interpreter_builder, "options", InterpreterOptions(sanitize_overflow=False))
        yield
