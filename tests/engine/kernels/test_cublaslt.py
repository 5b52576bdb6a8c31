from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.kernels import cublaslt, fp8
from engine.kernels.cublaslt import gemm_without_workspace
from engine.kernels.fp8 import FP8, RoundedRows, Scale, quantise_rows, scaled_gemm


def problem(device, rows, inputs, outputs, bias):
    """Operands of :func:`gemm_without_workspace`, and its result in float64."""
    x, weight = (
        quantise_rows(torch.randn(count, inputs, device=device, dtype=torch.bfloat16))
        for count in (rows, outputs)
    )
    given = torch.randn(outputs, device=device, dtype=torch.bfloat16) if bias else None
    exact = (x.numbers.double() @ weight.numbers.double().T) * x.scale * weight.scale.T
    operands = x.numbers, weight.numbers, x.scale, weight.scale, given
    return operands, exact if given is None else exact + given.double()


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 16), (300, 512, 272), (1664, 1280, 3840)])
def test_equals_reference(hopper, rows, inputs, outputs, fast, bias):
    operands, expected = problem(hopper, rows, inputs, outputs, bias)
    found = gemm_without_workspace(*operands, fast=fast)
    assert found is not None, "the library has no such GEMM"
    assert error(found, expected) < 4e-3


@pytest.mark.gpu
def test_threads_share_plans(hopper):
    """Each call has addresses of its own."""
    problems = [problem(hopper, 300, 256, 512, True) for _ in range(8)]

    def run(index):
        operands, expected = problems[index % len(problems)]
        with torch.cuda.stream(torch.cuda.Stream(hopper)):
            found = gemm_without_workspace(*operands, fast=True)
            return error(found, expected)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(run, range(64))) < 4e-3


@pytest.mark.gpu
def test_operands_at_odd_addresses_are_left_to_torch(hopper):
    (numbers, weight, row_scale, scale, _), expected = problem(hopper, 300, 64, 16, False)
    odd = torch.empty(numbers.numel() + 16, dtype=FP8, device=hopper)[16:].view_as(numbers).copy_(numbers)
    assert gemm_without_workspace(odd, weight, row_scale, scale, None, fast=True) is None
    found = scaled_gemm(RoundedRows(odd, row_scale), weight, Scale(scale, 64, True), None, torch.bfloat16)
    assert error(found, expected) < 4e-3


def test_without_the_library_torch_computes(monkeypatch):
    """And tiles in one round."""
    monkeypatch.setattr(torch.version, "cuda", None)
    cublaslt._library.cache_clear()
    try:
        assert cublaslt._library() is None
    finally:
        cublaslt._library.cache_clear()
    called = []
    monkeypatch.setattr(fp8, "num_sms", lambda _: 4)
    monkeypatch.setattr(fp8, "gemm_without_workspace", lambda *_, **__: called.append("library"))
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **options: called.append(options["use_fast_accum"]))
    weight, scale = torch.zeros(272, 32).to(FP8), Scale(torch.ones(272, 1), 32, True)
    for count in (128, 129):
        rows = RoundedRows(torch.zeros(count, 32).to(FP8), torch.ones(count, 1))
        scaled_gemm(rows, weight, scale, None, torch.bfloat16)
    assert called == [True, "library", True]
