import pytest
import torch
import torch.nn.functional as F

from engine.kernels import dispatch, wide_gemm
from engine.kernels.activation import ACTIVATIONS
from engine.kernels.wide_gemm import supports, wide_gemm_gluon

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
    assert supports(x, weight)
    gate, up = F.linear(x.double(), weight.double(), None if given is None else given.double()).chunk(
        2, dim=1
    )
    expected = ACTIVATIONS[activation](gate) * up
    for _ in range(5):
        assert_close(wide_gemm_gluon(x, weight, given, activation), expected)


@pytest.mark.parametrize("hopper_gpu", [False, True])
def test_gates_of_many_rows_on_hopper_gpus_take_it(monkeypatch, hopper_gpu):
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(wide_gemm, "is_hopper", lambda _: hopper_gpu)
    monkeypatch.setattr(dispatch, "act_mul", lambda out, _: out)
    taken = []
    monkeypatch.setattr(dispatch, "wide_gemm_gluon", lambda x, *_: taken.append(len(x)))
    monkeypatch.setattr(dispatch, "skinny_gemm_triton", lambda *_, **__: None)
    for rows in (64, 65):
        x, weight, bias = problem("cpu", torch.bfloat16, rows, 16, 8, True)
        dispatch.linear(x, weight, bias, activation="silu")
        dispatch.linear(x, weight, bias)
    assert taken == ([65] if hopper_gpu else [])


def test_only_matrices_that_a_descriptor_can_describe_are_supported(monkeypatch):
    monkeypatch.setattr(wide_gemm, "is_hopper", lambda _: True)
    x, weight, _ = problem("cpu", torch.bfloat16, 65, 16, 8, False)
    assert supports(x, weight)
    assert not supports(x.float(), weight.float())
    assert not supports(x[:, :12].contiguous(), weight[:, :12].contiguous())
    assert not supports(x[1:].flatten()[1 : 1 + 64 * 15].view(64, 15), weight)


def test_large_weights_are_not_read_twice_for_a_few_more_rows(monkeypatch):
    """Half of the programs would run ahead of those that share their weights."""
    monkeypatch.setattr(wide_gemm, "is_hopper", lambda _: True)
    large, small = (torch.empty(outputs, 4096, dtype=torch.bfloat16) for outputs in (32_768, 2048))
    rows = [65, 128, 129, 255, 256, 257]
    taken = [supports(torch.empty(count, 4096, dtype=torch.bfloat16), large) for count in rows]
    assert taken == [True, True, False, False, True, True]
    assert supports(torch.empty(200, 4096, dtype=torch.bfloat16), small)
