"""Linear layers with fp8 weights equal float64 with the dequantised weight, in each kernel."""

from itertools import product

import pytest
import torch

from engine.kernels import dispatch, fp8, fp8_mma, skinny_gemm
from engine.kernels.act_mul import act_mul, act_rounded
from engine.kernels.activation import ACTIVATIONS
from engine.kernels.fp8 import (
    FP8,
    Scale,
    dequantise,
    dequantise_reference,
    dequantise_triton,
    dequantised_gemm,
    quantise_rows,
    quantise_rows_reference,
    quantise_rows_triton,
    scaled_gemm,
)
from engine.kernels.fp8_mma import Fp8Tile, fp8_mma_gluon
from engine.kernels.gemv import gemv_triton
from engine.kernels.layer_norm import add_layer_norm, layer_norm_rounded, layer_norm_rounded_triton
from engine.kernels.norm_gemv import norm_gemv_triton
from engine.kernels.rms_norm import rms_norm, rms_norm_rounded, rms_norm_rounded_reference
from engine.kernels.skinny_gemm import skinny_gemm_triton, split_counters
from engine.kernels.split_sums import SplitSums, whole

from .compare import assert_close
from .test_linear import float64_linear, sum_tolerance

#: Outputs, inputs, and the inputs of a group: all inputs, or groups of which the last may be cut.
SIZES = [(34, 40, 64), (70, 1100, 128), (8, 1536, 2048), (4, 900, 16), (130, 70, 32), (66, 256, 128)]


def problem(device, dtype, rows, outputs, inputs, group, *, round_inputs=False):
    """Return an input, an fp8 weight within a wider one of NaN, its scales, a bias, and the weight in
    float64. The scales differ by a factor of several between outputs and between groups."""
    x = torch.randn(rows, inputs).to(device, dtype)
    wide = torch.full((outputs + 1, inputs + 16), torch.nan, device=device).to(FP8)
    wide[:outputs, :inputs] = (torch.randn(outputs, inputs) * 30).to(FP8).to(device)
    groups = -(-inputs // group)
    values = (torch.rand(outputs, groups) * 3 + 0.2) * inputs**-0.5 / 30
    weight, scale = wide[:outputs, :inputs], Scale(values.to(device), group, round_inputs)
    exact = weight.double() * scale.values.double().repeat_interleave(group, 1)[:, :inputs]
    return x, weight, scale, torch.randn(outputs).to(device, dtype), exact


def tolerance(x, exact, bias, activation=None):
    return sum_tolerance(x, exact, bias, activation) if x.dtype == torch.float32 else 0.0


@pytest.mark.covering(1)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [*SIZES, (1, 5, 16), (33, 512, 128)])
def test_a_gemv(device, dtype, outputs, inputs, group, with_bias):
    x, weight, scale, bias, exact = problem(device, dtype, 1, outputs, inputs, group)
    bias = bias if with_bias else None
    expected = float64_linear(x, exact, bias)
    assert_close(gemv_triton(x, weight, bias, scale), expected, tolerance=tolerance(x, exact, bias))


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("size", "activation", "with_bias"),
    [
        (size, activation, (i + j) % 2 == 1)
        for (i, size), (j, activation) in product(enumerate(SIZES), enumerate([None, "silu"]))
    ],
)
def test_a_gemv_after_a_norm(device, dtype, size, activation, with_bias):
    x, weight, scale, bias, exact = problem(device, dtype, 1, *size)
    bias, norm = bias if with_bias else None, torch.rand(size[1]).to(device, dtype) + 0.5
    result, _ = norm_gemv_triton(x, x, norm, 1e-3, weight, bias, activation=activation, scale=scale)
    total = (x + x).double()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-3) * norm.double()
    expected = float64_linear(normed, exact, bias, activation)
    allowed = sum_tolerance(normed, exact, bias, activation) if dtype == torch.float32 else 0.0
    assert_close(result, expected, tolerance=allowed)


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("size", "activation", "rows", "with_bias"),
    [
        (size, activation, rows, (i + j + k) % 2 == 1)
        for (i, size), (j, activation), (k, rows) in product(
            enumerate(SIZES), enumerate([None, "silu"]), enumerate([2, 17])
        )
    ],
)
def test_a_skinny_gemm(device, dtype, size, activation, rows, with_bias):
    x, weight, scale, bias, exact = problem(device, dtype, rows, *size)
    bias = bias if with_bias else None
    result = skinny_gemm_triton(x, weight, bias, activation=activation, scale=scale)
    expected = float64_linear(x, exact, bias, activation)
    assert_close(result, expected, tolerance=tolerance(x, exact, bias, activation))


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(34, 2048, 2048), (130, 3100, 128)])
def test_split_k(device, dtype, monkeypatch, outputs, inputs, group):
    monkeypatch.setattr(skinny_gemm, "num_sms", lambda device: 3 * -(-outputs // 64))
    x, weight, scale, bias, exact = problem(device, dtype, 5, outputs, inputs, group)
    counters = split_counters(outputs, device)
    expected, allowed = float64_linear(x, exact, bias), tolerance(x, exact, bias)
    result = skinny_gemm_triton(x, weight, bias, counters=counters, scale=scale)
    assert_close(result, expected, tolerance=allowed)
    sums = skinny_gemm_triton(x, weight, bias, scale=scale, parts=True)
    assert_close(sums.total(), expected, tolerance=allowed)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("outputs", "inputs"), [(34, 272), (70, 4112)])
@pytest.mark.parametrize(("rows", "activation"), [(1, None), (2, "silu"), (17, None), (40, "silu")])
def test_a_skinny_gemm_of_rounded_rows(device, monkeypatch, rows, outputs, inputs, activation, splits):
    """Products of fp8 with fp8 are exact in float32."""
    monkeypatch.setattr(skinny_gemm, "num_sms", lambda device: splits * -(-outputs // 64))
    x, weight, scale, bias, _ = problem(device, torch.float32, rows, outputs, inputs, inputs)
    numbers, row_scale = quantise_rows_reference(x)
    counters = split_counters(outputs, device) if splits > 1 else None
    result = skinny_gemm_triton(
        numbers, weight, bias, activation=activation, counters=counters,
        scale=scale, row_scale=row_scale, dtype=torch.float32,
    )  # fmt: skip
    rounded = numbers.double() * row_scale
    exact = weight.double() * scale.values.double()
    # The tensor cores keep 14 bits of a sum over 128 products.
    least = 1e-3 if device.type == "cuda" else 0.0
    allowed = max(least, sum_tolerance(rounded, exact, bias, activation))
    expected = float64_linear(rounded, exact, bias, activation)
    assert_close(result, expected, tolerance=allowed)
    if activation is None:
        sums = skinny_gemm_triton(
            numbers, weight, bias, scale=scale, row_scale=row_scale, dtype=torch.float32, parts=True
        )
        assert_close(whole(sums), expected, tolerance=allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [None, Fp8Tile(32, 4, 2, 1), Fp8Tile(16, 1, 8, 3)], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(34, 320), (70, 4160), (192, 1536), (8, 64)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_rounded_row(hopper, monkeypatch, outputs, inputs, activation, tile):
    """Products of fp8 with fp8 are exact in float32."""
    if tile is not None:
        monkeypatch.setattr(fp8_mma, "choose_tile", lambda *_, **__: tile)
    x, weight, scale, bias, _ = problem(hopper, torch.float32, 1, outputs, inputs, inputs)
    numbers, row_scale = quantise_rows_reference(x)
    result = fp8_mma_gluon(
        numbers, weight.contiguous(), bias, activation=activation,
        scale=scale, row_scale=row_scale, dtype=torch.float32,
    )  # fmt: skip
    rounded = numbers.double() * row_scale
    exact = weight.double() * scale.values.double()
    allowed = max(1e-5, sum_tolerance(rounded, exact, bias, activation))
    assert_close(result, float64_linear(rounded, exact, bias, activation), tolerance=allowed)


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "inputs"), [(34, 320), (200, 3584), (70, 4096), (8, 64)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_row_that_the_kernel_rounds(hopper, outputs, inputs, activation):
    # The product of gates and factors stays within float32.
    for factor in (1.0, 1e-30, 1e15, 0.0):
        x, weight, scale, bias, _ = problem(hopper, torch.bfloat16, 1, outputs, inputs, inputs)
        x, weight = x * factor, weight.contiguous()
        options = {"activation": activation, "scale": scale, "dtype": torch.float32}
        # The largest number is the first, the last, or anywhere.
        for place in (0, inputs - 1, None):
            if place is not None:
                x[0, place] = -9 * factor
            numbers, row_scale = quantise_rows(x)
            expected = fp8_mma_gluon(numbers, weight, bias, row_scale=row_scale, **options)
            rounded, exact = numbers.double() * row_scale, weight.double() * scale.values.double()
            allowed = max(1e-5, sum_tolerance(rounded, exact, bias, activation))
            assert_close(fp8_mma_gluon(x, weight, bias, **options), expected.double(), tolerance=allowed)


@pytest.mark.parametrize("size", SIZES)
def test_many_rows(device, dtype, size):
    x, weight, scale, bias, exact = problem(device, dtype, 70, *size)
    expected = float64_linear(x, exact, bias)
    assert_close(dequantised_gemm(x, weight, scale, bias), expected)
    assert_close(dispatch.linear(x, weight, bias, scale=scale), expected)
    for run in (dequantise, dequantise_reference, dequantise_triton):
        wide = run(weight, scale, torch.float32)
        assert torch.equal(wide, exact.float()) and wide.is_contiguous()


@pytest.mark.parametrize("run", [quantise_rows, quantise_rows_reference, quantise_rows_triton])
@pytest.mark.parametrize("inputs", [64, 1100])
def test_rows_are_rounded_to_the_nearest_of_their_scale(device, run, inputs):
    wide = torch.full((9, inputs + 3), torch.nan)
    wide[:, :inputs] = torch.randn(9, inputs) * torch.logspace(-6, 6, 9)[:, None]
    wide[4] = 0.0
    x = wide.to(device)[:, :inputs]
    if run is quantise_rows_triton and device.type == "cpu":
        pytest.skip("Triton's interpreter rounds wrongly to fp8")
    numbers, scale = run(x)
    assert numbers.dtype == FP8 and numbers[4].float().eq(0).all() and numbers.is_contiguous()
    error = (numbers.float() * scale - x).abs()
    # Four bits of mantissa, or a step of 2**-9 near zero.
    assert (error <= torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10) * 1.0001).all()
    large = x.abs().amax(1) > 0
    assert numbers.float().abs().amax(1)[large].eq(448).all()


@pytest.mark.parametrize("run", [quantise_rows_reference, quantise_rows_triton])
@pytest.mark.parametrize("inputs", [64, 1024, 2500])
def test_rows_of_fp8_numbers_stay_as_they_are(device, run, inputs):
    numbers = (torch.randn(7, inputs) * 60).clamp(-448, 448).to(FP8).float()
    numbers[:, -1], numbers[3] = 448, -448
    scale = 2.0 ** torch.arange(-9.0, 12.0, 3.0)[:, None]
    wide = torch.full((7, inputs + 3), torch.nan)
    wide[:, :inputs] = numbers * scale
    found, found_scale = run(wide.to(device)[:, :inputs])
    assert torch.equal(found.float().cpu(), numbers) and torch.equal(found_scale.cpu(), scale)


@pytest.mark.parametrize("run", [quantise_rows_reference, quantise_rows_triton])
@pytest.mark.parametrize(("inputs", "group"), [(64, 64), (256, 128), (2500, 128), (4096, 128)])
def test_groups_of_fp8_numbers_stay_as_they_are(device, run, inputs, group):
    numbers = (torch.randn(5, inputs) * 60).clamp(-448, 448).to(FP8).float()
    numbers[:, group - 1 :: group], numbers[:, -1] = 448, -448
    scale = 2.0 ** torch.randint(-9, 9, (5, -(-inputs // group)))
    wide = torch.full((5, inputs + 3), torch.nan)
    wide[:, :inputs] = numbers * scale.repeat_interleave(group, dim=1)[:, :inputs]
    found, found_scale = run(wide.to(device)[:, :inputs], group)
    assert torch.equal(found.float().cpu(), numbers) and torch.equal(found_scale.cpu(), scale)
    assert found.is_contiguous() and found_scale.is_contiguous()


@pytest.mark.parametrize("offset", [None, 1.0])
@pytest.mark.parametrize(("rows", "size"), [(1, 3584), (3, 40), (70, 1100)])
def test_rounding_in_the_kernel_before_is_rounding_after_it(device, rows, size, offset):
    """Bit by bit: results are rounded to their dtype first."""
    x, residual = torch.randn(2, rows, size).to(device, torch.bfloat16)
    norm = (torch.rand(size) + 0.5).to(device, torch.bfloat16)
    alone, _ = rms_norm_rounded(x, norm, 1e-6, None, offset=offset)
    after, total = rms_norm_rounded(x, norm, 1e-6, residual, offset=offset)
    sums = SplitSums(torch.stack((x.float(), torch.zeros_like(x, dtype=torch.float32))), x.dtype)
    added_up, _ = rms_norm_rounded(sums, norm, 1e-6, residual, offset=offset)
    expected, expected_total = rms_norm(x, norm, 1e-6, residual, offset=offset)
    assert torch.equal(total, expected_total)
    gate_up = torch.cat((x, residual), dim=1)
    pairs = [
        (alone, rms_norm(x, norm, 1e-6, offset=offset)),
        (after, expected),
        (added_up, expected),
        (act_rounded(gate_up, "silu", gated=True), act_mul(gate_up, "silu")),
        (act_rounded(x, "relu", gated=False), x.relu()),
    ]
    for found, plain in pairs:
        rounded = quantise_rows(plain)
        assert torch.equal(found.numbers.view(torch.uint8), rounded.numbers.view(torch.uint8))
        assert torch.equal(found.scale, rounded.scale)


def test_a_layer_norm_rounds_by_the_largest_of_all_chunks(device):
    """One row's largest number is in the first chunk, the other's in the last."""
    x, residual = torch.randn(2, 2, 1300, device=device)
    x[0, 7] = x[1, 1299] = 90
    weight, bias = torch.randn(2, 1300, device=device)
    weight[7] = weight[1299] = 1
    (numbers, scale), total = layer_norm_rounded_triton(x, residual, weight, bias, 1e-6)
    expected, expected_total = add_layer_norm(x, residual, weight, bias, 1e-6)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(scale, quantise_rows(expected).scale, rtol=1e-5, atol=0)
    if device.type == "cuda":
        # Triton's interpreter rounds wrongly to fp8.
        allowed = torch.maximum(expected.abs() * 2.0**-4, scale * 2.0**-10)
        assert ((numbers.float() * scale - expected).abs() <= allowed * 1.1).all()


@pytest.mark.parametrize(("rows", "size"), [(1, 1280), (3, 40), (70, 1100)])
def test_layer_norms_and_activations_round_their_rows(device, rows, size):
    """A number between two of fp8 may go up or down by the last bit of what is rounded."""
    x, residual = torch.randn(2, rows, size).to(device, torch.bfloat16)
    weight, bias = torch.randn(2, size).to(device, torch.bfloat16)
    found, total = layer_norm_rounded(x, residual, weight, bias, 1e-6)
    alone, same = layer_norm_rounded(total, None, weight, bias, 1e-6)
    expected, expected_total = add_layer_norm(x, residual, weight, bias, 1e-6)
    assert torch.equal(total, expected_total) and torch.equal(same, total)
    for numbers, scale in (found, alone):
        allowed = torch.maximum(expected.abs().float() * 2.0**-4, scale * 2.0**-10)
        assert ((numbers.float() * scale - expected).abs() <= allowed * 1.1).all()
        torch.testing.assert_close(scale, quantise_rows(expected).scale, rtol=2.0**-7, atol=0)
    for name, activation in ACTIVATIONS.items():
        numbers, scale = act_rounded(x, name, gated=False)
        exact = activation(x.double())
        # Half a step of four bits of mantissa, or of the smallest numbers at this row's scale.
        allowed = torch.maximum(exact.abs() * 2.0**-4, scale.double() * 2.0**-10)
        assert ((numbers.double() * scale - exact).abs() <= allowed * 1.1 + 0.004).all()


@pytest.mark.parametrize(
    ("rows", "dtype", "reads", "scaled", "expected"),
    [
        (1, torch.bfloat16, True, True, "gemv_triton"),
        (1, torch.bfloat16, True, False, "gemv_triton"),
        (2, torch.bfloat16, True, True, "skinny_gemm_triton"),
        (64, torch.bfloat16, True, True, "skinny_gemm_triton"),
        (64, torch.bfloat16, True, False, "skinny_gemm_triton"),
        (2, torch.float32, True, False, "dequantised_gemm"),
        (65, torch.bfloat16, True, True, "scaled_gemm"),
        (65, torch.bfloat16, True, False, "dequantised_gemm"),
        (1, torch.bfloat16, False, False, "dequantised_gemm"),
        (2, torch.bfloat16, False, False, "dequantised_gemm"),
    ],
)
def test_the_choice_among_kernels(monkeypatch, rows, dtype, reads, scaled, expected):
    called = []
    for name in ("gemv_triton", "skinny_gemm_triton", "fp8_mma_gluon", "scaled_gemm", "dequantised_gemm"):
        monkeypatch.setattr(dispatch, name, lambda *_, name=name, **__: called.append(name))
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(dispatch, "reads_fp8", lambda _: reads)
    monkeypatch.setattr(dispatch, "supports_scaled", lambda *_: scaled)
    weight, scale = torch.zeros(64, 64).to(FP8), Scale(torch.ones(64, 1), 64)
    monkeypatch.setattr(dispatch, "quantise_rows", quantise_rows_reference)
    dispatch.linear(torch.zeros(rows, 64, dtype=dtype), weight, scale=scale)
    assert called == [expected]


@pytest.mark.parametrize("large", [False, True])
def test_a_row_alone_is_rounded_for_large_weights_and_in_norms(monkeypatch, large):
    weight, scale = torch.zeros(64, 64).to(FP8), Scale(torch.ones(64, 1), 64)
    called = []
    for name in ("gemv_triton", "fp8_mma_gluon", "norm_gemv_triton"):
        monkeypatch.setattr(dispatch, name, lambda *_, name=name, **__: called.append(name))
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(dispatch, "supports_scaled", lambda *_: True)
    monkeypatch.setattr(dispatch, "MAX_UNROUNDED", weight.numel() - large)
    monkeypatch.setattr(dispatch, "quantise_rows", quantise_rows_reference)
    monkeypatch.setattr(dispatch, "rms_norm_rounded", rms_norm_rounded_reference)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    assert dispatch.takes_rounded(x, weight, scale) == large
    dispatch.linear(x, weight, scale=scale)
    dispatch.norm_linear(x, None, torch.ones(64), 1e-6, weight, scale=scale)
    assert called == ["fp8_mma_gluon" if large else "gemv_triton", "fp8_mma_gluon"]


def test_inputs_are_rounded_only_where_the_checkpoint_was_made_for_that(monkeypatch):
    monkeypatch.setattr(fp8, "is_hopper", lambda _: True)
    weight, x = torch.zeros(64, 32).to(FP8), torch.zeros(2, 32, dtype=torch.bfloat16)
    per_output, groups = torch.ones(64, 1), torch.ones(64, 2)
    assert fp8.supports_scaled(x, weight, Scale(per_output, 32, True))
    assert not fp8.supports_scaled(x, weight, Scale(per_output, 32, False))
    assert not fp8.supports_scaled(x, weight, Scale(groups, 16, True))
    assert not fp8.supports_scaled(x.float(), weight, Scale(per_output, 32, True))
    assert not fp8.supports_scaled(x[:, :24], weight[:, :24], Scale(per_output, 32, True))


@pytest.mark.gpu
def test_fp8_tensor_cores_are_near_the_dequantised_product(device):
    if device.type == "cpu" or not fp8.is_hopper(device):
        pytest.skip("fp8 tensor cores need a Hopper GPU")
    x = torch.randn(300, 512, device=device, dtype=torch.bfloat16)
    weight = (torch.randn(256, 512, device=device) * 30).to(FP8)
    scale = Scale(torch.rand(256, 1, device=device) / 600, 512, True)
    bias = torch.randn(256, device=device, dtype=torch.bfloat16)
    expected = float64_linear(x, dequantise(weight, scale, torch.float64), bias)
    results = [scaled_gemm(quantise_rows(x), weight, scale, bias, x.dtype)]
    results += [dispatch.linear(x[:rows], weight, bias, scale=scale) for rows in (1, 5, 64)]
    for result in results:
        error = (result.double() - expected[: len(result)]).norm() / expected[: len(result)].norm()
        # Rounding the input to four bits errs by 2**-5 / sqrt(3) at most, and by a sum's share of that.
        assert error < 0.04
