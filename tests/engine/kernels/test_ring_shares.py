import pytest
import torch

from engine.kernels import dispatch, ring_shares
from engine.kernels.device import num_sms
from engine.kernels.dispatch import linear
from engine.kernels.ring_shares import choose_share, ring_shares_gluon, share_of, supports

from .compare import assert_close
from .test_linear import float64_linear


def problem(device, rows, outputs, inputs, *, gated, dtype=torch.bfloat16):
    x = torch.randn(rows, inputs + 8, device=device, dtype=dtype)[:, :inputs]
    weight = torch.randn(outputs * (2 if gated else 1), inputs, device=device, dtype=dtype) * inputs**-0.5
    return x, weight


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("inputs", [72, 1000, 2048])
# Of one program. The last one has less than the others, or begins behind the last output of its first tile.
@pytest.mark.parametrize(
    ("share", "missing", "dtype"),
    [
        (128, 0, torch.bfloat16),
        (128, 100, torch.float16),
        (136, 20, torch.bfloat16),
        (144, 64, torch.bfloat16),
        (104, 8, torch.bfloat16),
        (48, 0, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("rows", [17, 64])
def test_it_equals_float64(hopper, monkeypatch, rows, share, missing, inputs, activation, dtype):
    gated = activation is not None
    monkeypatch.setattr(ring_shares, "choose_share", lambda *_, gated: share_of(share, gated=gated))
    x, weight = problem(hopper, rows, share * num_sms(hopper) - missing, inputs, gated=gated, dtype=dtype)
    expected = float64_linear(x, weight, None, activation)
    for _ in range(5):
        assert_close(ring_shares_gluon(x, weight, activation), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("outputs", "inputs", "gated"),
    [(12288, 4096, False), (11008, 4096, True), (14336, 4096, True), (27392, 5120, True)],
)
def test_layers_of_public_models_take_it_and_equal_float64(hopper, outputs, inputs, gated):
    for rows in (17, 33, 64):
        x, weight = problem(hopper, rows, outputs, inputs, gated=gated)
        assert supports(x, weight, None, gated=gated)
        activation = "silu" if gated else None
        assert_close(linear(x, weight, activation=activation), float64_linear(x, weight, None, activation))


@pytest.mark.parametrize(
    ("outputs", "gated", "programs"),
    [
        (12288, False, 96), (15360, False, 120), (17152, False, 127), (19008, False, 132), (11008, True, 126),
        (12288, True, 128), (13824, True, 124), (14336, True, 128), (18944, True, 132), (27392, True, 264),
    ],
)  # fmt: skip
def test_shares_cover_all_outputs(outputs, gated, programs):
    share = choose_share(outputs, 132, gated=gated)
    assert programs * share.outputs >= outputs > (programs - 1) * share.outputs
    assert share.tile < share.outputs <= share.tile + share.rest and share.depth >= 4
    assert (share.outputs - share.tile) % share.box == 0 and share.box % 8 == 0


@pytest.mark.parametrize("outputs", [100, 6144, 8960, 10240, 19100, 40000])
def test_few_outputs_and_many_are_for_other_kernels(outputs):
    assert choose_share(outputs, 132, gated=False) is choose_share(outputs, 132, gated=True) is None
    assert choose_share(27392, 132, gated=False) is None


@pytest.mark.parametrize("hopper_gpu", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_17_to_64_rows_take_it_on_hopper_gpus(monkeypatch, activation, hopper_gpu):
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(ring_shares, "is_hopper", lambda _: hopper_gpu)
    monkeypatch.setattr(ring_shares, "num_sms", lambda _: 2)
    taken = []
    monkeypatch.setattr(dispatch, "ring_shares_gluon", lambda x, *_: taken.append(len(x)))
    monkeypatch.setattr(dispatch, "skinny_gemm_triton", lambda *_, **__: None)
    gated = activation is not None
    for rows in (16, 17, 64):
        x, weight = problem("cpu", rows, 264, 2064, gated=gated)
        linear(x, weight, activation=activation)
        # With a bias, with other shares, with fewer inputs, and what no descriptor describes.
        linear(x, weight, weight[:, 0], activation=activation)
        linear(x, weight[: len(weight) // 4], activation=activation)
        linear(x[:, :1024], weight[:, :1024], activation=activation)
        linear(x[:, 1:2049], weight[:, :2048], activation=activation)
    assert taken == ([17, 64] if hopper_gpu else [])
