import ctypes
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

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


class StandIn:
    """A library whose call ``fails`` returns an error, and which has no algorithm if ``found`` is 0.

    Attributes:
        given: addresses of a call's operands, and of its scales and bias by attribute.
    """

    def __init__(self, fails="", found=1):
        self.fails, self.found, self.given = fails, found, {}

    def __getattr__(self, name):
        def call(*arguments):
            if name == "cublasLtMatmulDescSetAttribute":
                self.given[arguments[1]] = arguments[2]._obj.value
            elif name == "cublasLtMatmulAlgoGetHeuristic":
                arguments[-1]._obj.value = self.found
            elif name == "cublasLtMatmul":
                self.given["weight"], self.given["rows"], self.given["out"] = (
                    arguments[place].value for place in (3, 5, 8)
                )
            return 7 if name == self.fails else 0

        return call


@pytest.fixture
def use_library(monkeypatch):
    """Have GEMMs of a CPU's tensors given to a :class:`StandIn`, which is returned."""

    def use(**options):
        library = StandIn(**options)
        cublaslt._plan.cache_clear()
        monkeypatch.setattr(cublaslt, "_library", lambda: library)
        return library

    monkeypatch.setattr(cublaslt, "_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    yield use
    cublaslt._plan.cache_clear()


def aligned(dtype, *shape, offset=0):
    """Zeros that start ``offset`` bytes behind a multiple of 256."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.zeros(size + 512, dtype=torch.uint8)
    start = -memory.data_ptr() % 256 + offset
    return memory[start : start + size].view(dtype).view(shape)


def zeros(rows=30, inputs=64, outputs=32):
    """Operands of :func:`gemm_without_workspace`, with a bias."""
    matrices = aligned(FP8, rows, inputs), aligned(FP8, outputs, inputs)
    scales = aligned(torch.float32, rows, 1), aligned(torch.float32, outputs, 1)
    return [*matrices, *scales, aligned(torch.bfloat16, outputs)]


def test_the_library_gets_the_addresses(use_library):
    library = use_library()
    numbers, weight, row_scale, scale, bias = zeros()
    out = gemm_without_workspace(numbers, weight, row_scale, scale, bias, fast=True)
    assert out.shape == (30, 32) and out.dtype == torch.bfloat16
    wanted = {"weight": weight, "rows": numbers, "out": out, 17: scale, 18: row_scale, 8: bias}
    assert {name: library.given[name] for name in wanted} == {
        name: each.data_ptr() for name, each in wanted.items()
    }


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, aligned(torch.uint8, 30, 64)),
        (1, aligned(FP8, 32, 32)),
        (1, aligned(FP8, 64, 32).t()),
        (2, aligned(torch.float32, 10, 1)),
        (2, aligned(torch.float64, 30, 1)),
        (3, aligned(torch.float32, 5, 1)),
        (4, aligned(torch.float32, 32)),
        (4, aligned(torch.bfloat16, 64)[::2]),
        (4, aligned(torch.bfloat16, 5)),
    ],
)
def test_operands_of_other_shapes_or_dtypes_are_not_passed_on(use_library, place, wrong):
    use_library()
    operands = zeros()
    operands[place] = wrong
    with pytest.raises(AssertionError):
        gemm_without_workspace(*operands, fast=True)


@pytest.mark.parametrize("place", range(5))
def test_each_address_is_looked_at(use_library, place):
    use_library()
    operands = zeros()
    given = operands[place]
    operands[place] = aligned(given.dtype, *given.shape, offset=16)
    assert gemm_without_workspace(*operands, fast=True) is None


@pytest.mark.parametrize(
    "options",
    [
        {"fails": "cublasLtMatmulDescSetAttribute"},
        {"fails": "cublasLtMatmulAlgoGetHeuristic"},
        {"found": 0},
        {"fails": "cublasLtMatmul"},
    ],
)
def test_torch_computes_what_the_library_refuses(use_library, monkeypatch, options):
    use_library(**options)
    monkeypatch.setattr(fp8, "num_sms", lambda _: 0)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: "torch")
    numbers, weight, row_scale, scale, bias = zeros()
    rows, kept = RoundedRows(numbers, row_scale), Scale(scale, 64, True)
    assert scaled_gemm(rows, weight, kept, bias, torch.bfloat16) == "torch"


def test_no_rows_are_left_to_torch(use_library):
    use_library()
    assert gemm_without_workspace(*zeros(rows=0), fast=True) is None


@pytest.mark.parametrize(
    ("cuda", "available", "version", "found"),
    [
        ("13.0", True, 130000, True),
        ("12.9", True, 120900, True),
        ("12.8", True, 120800, False),
        ("12.9", True, None, False),
        ("12.9", False, 120900, False),
        (None, True, 120900, False),
    ],
)
def test_the_library_is_the_one_that_is_loaded(monkeypatch, cuda, available, version, found):
    """``version`` None: there is none of that name."""

    def opened(name, mode):
        assert name == f"libcublasLt.so.{cuda[:2]}" and mode & os.RTLD_NOLOAD
        if version is None:
            raise OSError
        return SimpleNamespace(cublasLtGetVersion=Mock(return_value=version))

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(ctypes, "PyDLL", opened)
    assert (cublaslt._library.__wrapped__() is not None) == found


def test_tiles_in_one_round_are_left_to_torch(monkeypatch):
    called = []
    monkeypatch.setattr(fp8, "num_sms", lambda _: 4)
    monkeypatch.setattr(fp8, "gemm_without_workspace", lambda *_, **__: called.append("library"))
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **options: called.append(options["use_fast_accum"]))
    weight, scale = torch.zeros(272, 32).to(FP8), Scale(torch.ones(272, 1), 32, True)
    for count in (128, 129):
        rows = RoundedRows(torch.zeros(count, 32).to(FP8), torch.ones(count, 1))
        scaled_gemm(rows, weight, scale, None, torch.bfloat16)
    assert called == [True, "library", True]
