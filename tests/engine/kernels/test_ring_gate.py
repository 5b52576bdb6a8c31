import pytest
import torch

from engine.kernels import dispatch, ring_gate
from engine.kernels.device import num_sms
from engine.kernels.dispatch import linear
from engine.kernels.ring_gate import choose_share, ring_gate_gluon, supports

from .compare import assert_close
from .test_linear import float64_linear


def problem(device, rows, outputs, inputs, dtype=torch.bfloat16):
    x = torch.randn(rows, inputs + 8, device=device, dtype=dtype)[:, :inputs]
    return x, torch.randn(2 * outputs, inputs, device=device, dtype=dtype) * inputs**-0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [72, 1000, 1536])
# Of one program; in the first case the last programs have less than the others or nothing.
@pytest.mark.parametrize(("share", "missing"), [(132, 0), (136, 100), (144, 64)])
@pytest.mark.parametrize("rows", [17, 64])
def test_it_equals_float64(hopper, rows, share, missing, inputs, dtype):
    x, weight = problem(hopper, rows, share * num_sms(hopper) - missing, inputs, dtype)
    assert supports(x, weight, None)
    expected = float64_linear(x, weight, None, "silu")
    for _ in range(5):
        assert_close(ring_gate_gluon(x, weight, "silu"), expected)


@pytest.mark.parametrize(("outputs", "sms"), [(18944, 132), (17152, 132), (2600, 20)])
def test_shares_cover_all_outputs(outputs, sms):
    share = choose_share(outputs, sms)
    assert sms * (128 + share.rest) >= outputs > sms * (128 + share.rest - 4)
    assert share.rest <= share.box <= 16 and share.depth >= 3


@pytest.mark.parametrize("outputs", [100, 8960, 14336, 16896, 19100])
def test_no_rest_and_much_of_it_are_for_other_kernels(outputs):
    assert choose_share(outputs, 132) is None


@pytest.mark.parametrize("hopper_gpu", [False, True])
def test_gates_of_17_to_64_rows_take_it_on_hopper_gpus(monkeypatch, hopper_gpu):
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(ring_gate, "is_hopper", lambda _: hopper_gpu)
    monkeypatch.setattr(ring_gate, "num_sms", lambda _: 2)
    taken = []
    monkeypatch.setattr(dispatch, "ring_gate_gluon", lambda x, *_: taken.append(len(x)))
    monkeypatch.setattr(dispatch, "skinny_gemm_triton", lambda *_, **__: None)
    for rows in (16, 17, 64):
        x, weight = problem("cpu", rows, 264, 64)
        linear(x, weight, activation="silu")
        # Without a gate, with a bias, with other shares, and what no descriptor describes.
        linear(x, weight)
        linear(x, weight, weight[:, 0], activation="silu")
        linear(x, weight[:512], activation="silu")
        linear(x[:, 1:57], weight[:, :56], activation="silu")
    assert taken == ([17, 64] if hopper_gpu else [])
