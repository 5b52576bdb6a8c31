import pytest
import torch
import torch.nn.functional as F

from engine.kernels import dispatch, wide_gemm
from engine.kernels.activation import ACTIVATIONS
from engine.kernels.fp8 import FP8, MAX_FAST_INPUTS, Scale, quantise_rows, quantise_rows_reference
from engine.kernels.rms_norm import rms_norm_rounded_reference
from engine.kernels.wide_gemm import choose_tile, supports, supports_rounded, wide_gemm_gluon

from .compare import assert_close


def problem(device, dtype, rows, inputs, outputs, bias):
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(2 * outputs, inputs, device=device, dtype=dtype) * inputs**-0.5
    return x, weight, torch.randn(2 * outputs, device=device, dtype=dtype) if bias else None


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(65, 64, 8), (128, 72, 200), (448, 1536, 8960), (2300, 136, 1000)]
)
def test_equals_reference(hopper, rows, inputs, outputs, activation, bias):
    x, weight, given = problem(hopper, torch.bfloat16, rows, inputs, outputs, bias)
    gate, up = F.linear(x.double(), weight.double(), None if given is None else given.double()).chunk(
        2, dim=1
    )
    expected = ACTIVATIONS[activation](gate) * up
    for _ in range(5):
        assert_close(wide_gemm_gluon(x, weight, given, activation), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(65, 64, 8), (130, 80, 200), (448, 3584, 2368), (2300, 144, 1000)]
)
def test_rounded_rows_equal_the_reference(hopper, rows, inputs, outputs, bias):
    x, weight, given = problem(hopper, torch.bfloat16, rows, inputs, outputs, bias)
    rounded, numbers = quantise_rows(x), quantise_rows(weight)
    exact = F.linear(
        rounded.numbers.double() * rounded.scale,
        numbers.numbers.double() * numbers.scale,
        None if given is None else given.double(),
    )
    gate, up = exact.chunk(2, dim=1)
    expected = F.silu(gate) * up
    for _ in range(3):
        found = wide_gemm_gluon(
            rounded.numbers, numbers.numbers, given, "silu", scale=Scale(numbers.scale, inputs, True),
            row_scale=rounded.scale, dtype=torch.bfloat16,
        )  # fmt: skip
        # The tensor cores keep 14 bits of sums.
        assert (found.double() - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("hopper_gpu", [False, True])
def test_gates_of_rounded_rows_take_it(monkeypatch, hopper_gpu):
    """Then their gate is no kernel of its own. Sums of more inputs are left to torch, which is more exact."""
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(dispatch, "supports_scaled", lambda *_: True)
    monkeypatch.setattr(wide_gemm, "is_hopper", lambda _: hopper_gpu)
    monkeypatch.setattr(dispatch, "rms_norm_rounded", rms_norm_rounded_reference)
    monkeypatch.setattr(dispatch, "quantise_rows", quantise_rows_reference)
    taken = []

    def note(name, width):
        def run(x, weight, *_, **__):
            taken.append(name)
            return torch.zeros(len(getattr(x, "numbers", x)), len(weight) // width, dtype=torch.bfloat16)

        return run

    monkeypatch.setattr(dispatch, "wide_gemm_gluon", note("wide", 2))
    monkeypatch.setattr(dispatch, "scaled_gemm", note("torch", 1))
    monkeypatch.setattr(dispatch, "act_rounded", lambda x, *_, **__: taken.append("gate") or x)
    for inputs in (64, MAX_FAST_INPUTS + 16):
        x, weight, _ = problem("cpu", torch.bfloat16, 257, inputs, 8, False)
        numbers, scale = weight.to(FP8), Scale(torch.ones(16, 1), inputs, True)
        dispatch.norm_gated_rounded(
            x, None, torch.ones(inputs), 1e-6, numbers, activation="silu", scale=scale
        )
    assert taken == (["wide"] if hopper_gpu else ["torch", "gate"]) + ["torch", "gate"]


@pytest.mark.parametrize("hopper_gpu", [False, True])
def test_gates_of_many_rows_on_hopper_gpus_take_it(monkeypatch, hopper_gpu):
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(wide_gemm, "is_hopper", lambda _: hopper_gpu)
    monkeypatch.setattr(dispatch, "act_mul", lambda out, _: out)
    taken = []
    monkeypatch.setattr(dispatch, "wide_gemm_gluon", lambda x, *_: taken.append(len(x)))
    monkeypatch.setattr(dispatch, "skinny_gemm_triton", lambda *_, **__: None)
    for rows in (64, 288, 289):
        x, weight, bias = problem("cpu", torch.bfloat16, rows, 16, 8, True)
        dispatch.linear(x, weight, bias, activation="silu")
        dispatch.linear(x, weight, bias)
    assert taken == ([289] if hopper_gpu else [])


def test_only_matrices_that_a_descriptor_can_describe_are_supported(monkeypatch):
    monkeypatch.setattr(wide_gemm, "is_hopper", lambda _: True)
    x, weight, _ = problem("cpu", torch.bfloat16, 300, 16, 8, False)
    assert supports(x, weight)
    assert not supports(x.float(), weight.float())
    assert not supports(x[:, :12].contiguous(), weight[:, :12].contiguous())
    assert not supports(x[1:].flatten()[1 : 1 + 64 * 15].view(64, 15), weight)


def test_weights_are_not_read_twice_for_a_few_more_rows(monkeypatch):
    """Some of the programs would run ahead of those that share their weights."""
    monkeypatch.setattr(wide_gemm, "is_hopper", lambda _: True)
    large, small = (torch.empty(outputs, 4096, dtype=torch.bfloat16) for outputs in (32_768, 2048))

    def taken(weight, rows):
        return supports(torch.empty(rows, 4096, dtype=torch.bfloat16), weight)

    assert [taken(large, rows) for rows in (65, 256, 352, 353)] == [False, False, False, True]
    assert [taken(small, rows) for rows in (65, 256, 288, 289)] == [False, False, False, True]
    rounded = torch.empty(40_000, 4096, dtype=FP8)
    assert [supports_rounded(rows, rounded) for rows in (65, 256, 257)] == [False, False, True]
    tiles = [choose_tile(rows).weights for rows in (256, 257, 383, 384, 1025)]
    assert tiles == [128, 256, 256, 128, 256]
