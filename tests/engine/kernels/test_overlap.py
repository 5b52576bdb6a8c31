"""Kernels that start before the one ahead has ended."""

import pytest
import torch

from engine.graphs import CudaRecorder
from engine.kernels import overlap
from engine.kernels.linear import linear_triton
from engine.kernels.norm_linear import norm_linear_triton


def test_only_one_row_overlaps_and_only_where_the_device_can(monkeypatch):
    assert overlap.overlap(torch.zeros(1, 4)) == {"OVERLAP": False}
    monkeypatch.setattr(overlap, "_can_overlap", lambda device: True)
    assert overlap.overlap(torch.zeros(1, 4)) == {"OVERLAP": True, "launch_pdl": True}
    assert overlap.overlap(torch.zeros(2, 4)) == {"OVERLAP": False}


@pytest.mark.gpu
def test_each_waits_for_the_one_ahead(device):
    """A chain in which every product needs the whole of the one before it, launched and recorded."""
    if device.type == "cpu":
        pytest.skip("kernels overlap on a GPU only")
    size, length = 2048, 64
    weights = torch.randn(length, size, size, device=device) * size**-0.5
    norm, start = torch.ones(size, device=device), torch.randn(1, size, device=device)

    def chain() -> torch.Tensor:
        x, residual = start, None
        for number, weight in enumerate(weights):
            if number % 2:
                x = linear_triton(x, weight)
            else:
                x, residual = norm_linear_triton(x, residual, norm, 1e-6, weight)
        return x

    wanted, residual = start.double(), None
    for number, weight in enumerate(weights.double()):
        if number % 2 == 0:
            residual = wanted if residual is None else wanted + residual
            wanted = residual * torch.rsqrt(residual.square().mean() + 1e-6)
        wanted = wanted @ weight.T
    replay = CudaRecorder(device)(chain)
    for found in (chain(), *(replay().clone() for _ in range(20))):
        assert (found.double() - wanted).norm() < 1e-4 * wanted.norm()
