"""Kernels that start before the one ahead has ended."""

import pytest
import torch

from engine.graphs import CudaRecorder
from engine.kernels import overlap
from engine.kernels.linear import arrivals_of, linear
from engine.kernels.norm_linear import norm_linear


def test_only_a_few_rows_overlap_and_only_where_the_device_can(monkeypatch):
    assert overlap.overlap(torch.zeros(1, 4)) == {"OVERLAP": False}
    monkeypatch.setattr(overlap, "_can_overlap", lambda device: True)
    for rows in (1, 64):
        assert overlap.overlap(torch.zeros(rows, 4)) == {"OVERLAP": True, "launch_pdl": True}
    assert overlap.overlap(torch.zeros(65, 4)) == {"OVERLAP": False}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_each_waits_for_the_one_ahead(device, rows):
    """A chain in which every product needs the whole of the one before it, launched and recorded."""
    if device.type == "cpu":
        pytest.skip("kernels overlap on a GPU only")
    size, length = 2048, 64
    # A few rows are of half precision, and the chain adds up what is rounded.
    dtype, close = (torch.float32, 1e-4) if rows == 1 else (torch.bfloat16, 0.1)
    weights = (torch.randn(length, size, size, device=device) * size**-0.5).to(dtype)
    norm = torch.ones(size, device=device, dtype=dtype)
    start = torch.randn(rows, size, device=device).to(dtype)
    arrivals = arrivals_of(size, device)

    def chain() -> torch.Tensor:
        x, residual = start, None
        for number, weight in enumerate(weights):
            if number % 2:
                x = linear(x, weight, arrivals=arrivals)
            else:
                x, residual = norm_linear(x, residual, norm, 1e-6, weight)
        return x

    wanted, residual = start.double(), None
    for number, weight in enumerate(weights.double()):
        if number % 2 == 0:
            residual = wanted if residual is None else wanted + residual
            wanted = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + 1e-6)
        wanted = wanted @ weight.T
    replay = CudaRecorder(device)(chain)
    for found in (chain(), *(replay().clone() for _ in range(20))):
        assert (found.double() - wanted).norm() < close * wanted.norm()
