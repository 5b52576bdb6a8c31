"""Programmatic dependent launch: kernels that start before the previous one has finished."""

from collections.abc import Callable

import pytest
import torch

from engine.graphs import CudaCapture
from engine.kernels import pdl
from engine.kernels.dispatch import linear, norm_linear
from engine.kernels.expert_gemv import expert_gemv_triton
from engine.kernels.experts import ExpertMatrices
from engine.kernels.fp8 import FP8, Scale
from engine.kernels.norm_router import norm_router_triton
from engine.kernels.route import Routing
from engine.kernels.router_config import RouterConfig
from engine.kernels.skinny_gemm import split_counters


def test_only_few_rows_use_pdl_and_only_on_devices_that_support_it(monkeypatch):
    assert pdl.pdl_options(torch.zeros(1, 4)) == {"PDL": False}
    monkeypatch.setattr(pdl, "_supports_pdl", lambda device: True)
    for rows in (1, 64):
        assert pdl.pdl_options(torch.zeros(rows, 4)) == {"PDL": True, "launch_pdl": True}
    assert pdl.pdl_options(torch.zeros(65, 4)) == {"PDL": False}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_each_kernel_waits_for_the_previous_one(device, rows):
    """Run a chain in which every layer needs the whole output of the previous one, eager and captured."""
    if device.type == "cpu":
        pytest.skip("PDL needs a GPU")
    size, length = 2048, 64
    # Skinny GEMMs are 16-bit, and rounding errors add up along the chain.
    dtype, close = (torch.float32, 1e-4) if rows == 1 else (torch.bfloat16, 0.1)
    weights = (torch.randn(length, size, size, device=device) * size**-0.5).to(dtype)
    norm = torch.ones(size, device=device, dtype=dtype)
    start = torch.randn(rows, size, device=device).to(dtype)
    counters = split_counters(size, device)

    def chain() -> torch.Tensor:
        x, residual = start, None
        for number, weight in enumerate(weights):
            if number % 2:
                x = linear(x, weight, counters=counters)
            else:
                x, residual = norm_linear(x, residual, norm, 1e-6, weight)
        return x

    expected, residual = start.double(), None
    for number, weight in enumerate(weights.double()):
        if number % 2 == 0:
            residual = expected if residual is None else expected + residual
            expected = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + 1e-6)
        expected = expected @ weight.T
    replay = CudaCapture(device)(chain)
    for result in (chain(), *(replay().clone() for _ in range(20))):
        assert (result.double() - expected).norm() < close * expected.norm()


@pytest.mark.gpu
def test_overlap_with_a_row_that_is_rounded_changes_nothing(hopper):
    """The kernels that round a row let the next one start before they wait themselves."""
    size, length = 2048, 64
    weights = (torch.randn(length, size, size, device=hopper) * 30).to(FP8)
    scale = Scale(torch.full((size, 1), size**-0.5 / 30, device=hopper), size, round_inputs=True)
    norm = torch.ones(size, device=hopper, dtype=torch.bfloat16)
    start = torch.randn(1, size, device=hopper).bfloat16()

    def chain(between: Callable[[], None] = lambda: None) -> torch.Tensor:
        x, residual = start, None
        for number, weight in enumerate(weights):
            if number % 2:
                x = linear(x, weight, scale=scale)
            else:
                x, residual = norm_linear(x, residual, norm, 1e-6, weight, scale=scale)
            between()
        return x

    expected = chain(torch.cuda.synchronize)
    assert expected.isfinite().all() and expected.abs().max() > 0
    replay = CudaCapture(hopper)(chain)
    for result in (chain(), *(replay().clone() for _ in range(20))):
        assert torch.equal(result, expected)


@pytest.mark.gpu
def test_experts_of_one_token_read_nothing_too_early(hopper, monkeypatch):
    """They load weights before the previous kernel has ended, chosen by logits of the one before that."""
    experts, hidden, inner, length = 16, 1024, 512, 64

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=hopper) * shape[-1] ** -0.5).bfloat16()

    layers = [
        (
            randn(experts, hidden).float(),
            ExpertMatrices(randn(experts, 2 * inner, hidden)),
            ExpertMatrices(randn(experts, hidden, inner)),
        )
        for _ in range(8)
    ]
    norm, start = torch.ones_like(randn(hidden)), randn(1, hidden)

    def chain() -> torch.Tensor:
        x, residual = start, None
        for number in range(length):
            router, *matrices = layers[number % len(layers)]
            normed, residual, logits = norm_router_triton(x, residual, norm, 1e-6, router, 0.0)
            x = expert_gemv_triton(normed, Routing(logits, RouterConfig(experts, 4)), *matrices, "silu")
        return x

    with monkeypatch.context() as apart:
        apart.setattr(pdl, "_supports_pdl", lambda device: False)
        expected = chain()
    assert expected.isfinite().all() and expected.abs().max() > 0
    replay = CudaCapture(hopper)(chain)
    for result in (chain(), *(replay().clone() for _ in range(20))):
        assert torch.equal(result, expected)
