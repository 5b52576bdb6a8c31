import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Return the GPU if there is one, else the CPU, where kernels run in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if request.param == "bfloat16" and device.type == "cpu":
        pytest.skip("bfloat16 kernels run on a GPU only: the interpreter computes in float32")
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
