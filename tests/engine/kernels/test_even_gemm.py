import pytest
import torch
import torch.nn.functional as F

from engine.kernels import dispatch, even_gemm
from engine.kernels.even_gemm import NARROW, WIDE, choose_tile, even_gemm_gluon, possible_tiles
from engine.kernels.fp8 import FP8, MAX_FAST_INPUTS, Scale, quantise_rows, quantise_rows_reference

#: Of an H200.
SMS = 132


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [NARROW, WIDE])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(65, 64, 16), (130, 80, 208), (448, 3584, 4608), (512, 1536, 2048), (130, 8208, 208)],
)
def test_equals_reference(hopper, rows, inputs, outputs, tile, bias):
    x = quantise_rows(torch.randn(rows, inputs, device=hopper, dtype=torch.bfloat16))
    weight = quantise_rows(
        torch.randn(outputs, inputs, device=hopper, dtype=torch.bfloat16)
        * torch.rand(outputs, 1, device=hopper)
    )
    given = torch.randn(outputs, device=hopper, dtype=torch.bfloat16) if bias else None
    exact = (x.numbers.double() @ weight.numbers.double().T) * x.scale * weight.scale.T
    expected = exact if given is None else exact + given.double()
    for _ in range(3):
        found = even_gemm_gluon(
            x, weight.numbers, Scale(weight.scale, inputs, True), given, torch.bfloat16, tile=tile
        )
        # The tensor cores keep 14 bits of sums. Those of many inputs are added up outside, which leaves the
        # rounding of the result.
        bound = 4e-3 if inputs <= MAX_FAST_INPUTS else 1.8e-3
        assert (found.double() - expected).norm() < bound * expected.norm()
        assert (found.double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_it_is_chosen_where_tiles_of_128_outputs_leave_sms_idle():
    tiles = [choose_tile(rows, 4608, SMS) for rows in (65, 128, 129, 384, 385, 512, 513)]
    assert tiles == [NARROW, NARROW, None, None, WIDE, WIDE, None]
    assert [choose_tile(rows, 2048, SMS) for rows in (128, 512, 513)] == [NARROW, NARROW, None]
    assert possible_tiles(4608, SMS) == [NARROW, WIDE]
    assert possible_tiles(2048, SMS) == [NARROW] and possible_tiles(37_888, SMS) == []


@pytest.mark.parametrize("hopper_gpu", [False, True])
def test_rounded_rows_take_it(monkeypatch, hopper_gpu):
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(dispatch, "supports_scaled", lambda *_: True)
    monkeypatch.setattr(dispatch, "quantise_rows", quantise_rows_reference)
    monkeypatch.setattr(dispatch, "num_sms", lambda _: SMS)
    monkeypatch.setattr(even_gemm, "is_hopper", lambda _: hopper_gpu)
    taken = []

    def note(name):
        def run(x, weight, *_, **__):
            taken.append((name, weight.shape[1], len(x.numbers)))
            return F.linear(x.numbers.float(), weight.float())

        return run

    monkeypatch.setattr(dispatch, "even_gemm_gluon", note("even"))
    monkeypatch.setattr(dispatch, "scaled_gemm", note("torch"))
    many = MAX_FAST_INPUTS + 16
    for inputs, rows in ((64, 65), (64, 129), (many, 65)):
        weight = torch.zeros(4608, inputs).to(FP8)
        scale = Scale(torch.ones(4608, 1), inputs, True)
        dispatch.linear(torch.zeros(rows, inputs, dtype=torch.bfloat16), weight, scale=scale)
    first = "even" if hopper_gpu else "torch"
    assert taken == [(first, 64, 65), ("torch", 64, 129), (first, many, 65)]
