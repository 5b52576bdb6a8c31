from itertools import product

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import gemm_activation, gemv, skinny_gemm
from engine.kernels.act_mul import act_mul_reference
from engine.kernels.activation import ACTIVATIONS
from engine.kernels.gemm_activation import gemm_activation_reference, gemm_activation_triton
from engine.kernels.gemv import gemv_triton
from engine.kernels.norm_gemv import norm_gemv_triton
from engine.kernels.rms_norm import Addend, rms_norm_reference
from engine.kernels.skinny_gemm import skinny_gemm_triton, split_counters
from engine.kernels.split_sums import Pair

from .compare import TOLERANCE, assert_close

SIZES = [(34, 40), (70, 1100), (8, 1536), (4, 9000), (130, 65)]


def problem(device, dtype, rows, outputs, inputs, beyond=5):
    """Return an input, a weight and a bias; the first two are parts of wider tensors that hold NaN
    elsewhere."""
    wide = torch.full((rows, inputs + beyond), torch.nan, device=device, dtype=dtype)
    weight = torch.full((outputs + 1, inputs + 8), torch.nan, device=device, dtype=dtype)
    wide[:, :inputs] = torch.randn(rows, inputs)
    weight[:outputs, :inputs] = torch.randn(outputs, inputs) * inputs**-0.5
    return wide[:, :inputs], weight[:outputs, :inputs], torch.randn(outputs).to(device, dtype)


def double(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def float64_linear(x, weight, bias, activation=None):
    """Compute a linear layer in float64 without any kernel: kernels compute in float32 whatever the dtype."""
    out = F.linear(*double(x, weight, bias))
    return out if activation is None else act_mul_reference(out, activation)


def sum_tolerance(x, weight, bias, activation=None):
    """Return three times the relative error to expect of float32 sums that add one product after the other.

    Let ``u = 2**-24``, and ``S**2`` be the sum of the ``K`` squared products of an output. Rounding a sum
    ``s`` errs by a uniform variable of width ``ulp(s)``, whose variance averages ``0.18 * (u * s)**2`` over
    mantissas. After ``k`` products ``s**2`` is about ``k / K * S**2``. So the ``K`` errors add up to the
    variance ``0.18 * K / 2 * (u * S)**2``, or the standard deviation ``0.3 * sqrt(K) * u * S``.

    The gate multiplies these errors by its partial derivatives. With few outputs that matters: for one row of
    17 outputs the relative error can be three times that of the sums.
    """
    x, weight, bias = double(x, weight, bias)
    deviation = 0.3 * x.shape[1] ** 0.5 * 2.0**-24 * (x.square() @ weight.square().T).sqrt()
    sums = F.linear(x, weight, bias).requires_grad_()
    out = sums if activation is None else act_mul_reference(sums, activation)
    (slope,) = torch.autograd.grad(out.sum(), sums)
    return 3 * float((slope * deviation).norm() / out.detach().norm())


@pytest.mark.covering(1)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [*SIZES, (1, 5), (33, 512)])
def test_a_gemv_equals_float64(device, dtype, outputs, inputs, with_bias):
    x, weight, bias = problem(device, dtype, 1, outputs, inputs)
    bias = bias if with_bias else None
    assert_close(gemv_triton(x, weight, bias), float64_linear(x, weight, bias))


def norm_in_float64(x, norm, offset=None, *, centred=False):
    """The norm of a row with an epsilon of 1e-3."""
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True) if centred else wide
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3) * (norm.double() + (offset or 0.0))


@pytest.mark.parametrize(("outputs", "inputs", "activation"), [(7, 40, None), (6, 2500, "silu")])
@pytest.mark.parametrize("kind", ["after the layer", "on both sides", "of a pair", "of a multiple"])
def test_a_gemv_after_other_sums_and_norms_equals_float64(device, dtype, kind, outputs, inputs, activation):
    """Norms of results alone, with norms of sums as well, layer norms after pairs, norms after a multiple."""
    x, weight, bias = problem(device, dtype, 1, outputs, inputs)
    residual, other = torch.randn(2, 1, inputs).to(device, dtype) * 3 + 1
    norm, before = torch.rand(2, inputs).to(device, dtype) + 0.5
    offset, pair = (1.0 if kind == "on both sides" else None), kind == "of a pair"
    multiplier, before = (0.22, None) if kind == "of a multiple" else (1.0, before)
    result, total = norm_gemv_triton(
        Pair(other, x) if pair else Addend(x, before, 1e-3, offset, multiplier),
        residual,
        None if kind == "after the layer" else norm,
        1e-3,
        weight,
        bias,
        activation=activation,
        offset=offset,
        centred=pair,
    )
    if pair:
        assert torch.equal(total, residual + other + x)
    elif before is None:
        assert torch.equal(total, residual + x * multiplier)
    else:
        assert_close(total, residual + rms_norm_reference(x, before, 1e-3, offset=offset))
    # Of the kernel's own sum: a norm that rounds otherwise moves it.
    normed = total if kind == "after the layer" else norm_in_float64(total, norm, offset, centred=pair)
    tolerance = sum_tolerance(normed, weight, bias, activation) if dtype == torch.float32 else 0.0
    assert_close(result, float64_linear(normed, weight, bias, activation), tolerance=tolerance)


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("outputs", "inputs", "activation", "with_residual", "scale"),
    [
        (*size, activation, with_residual, (0.01, 30.0)[(i + j + with_residual) % 2])
        for (i, size), (j, activation), with_residual in product(
            enumerate(SIZES), enumerate([None, "silu", "gelu_pytorch_tanh"]), [False, True]
        )
    ]
    # Rows in two parts.
    + [(6, 2500, "silu", True, 0.01), (5, 5120, None, False, 30.0)],
)
def test_a_gemv_after_a_norm_equals_float64(device, dtype, outputs, inputs, with_residual, activation, scale):
    x, weight, bias = problem(device, dtype, 1, outputs, inputs)
    x *= scale
    residual = torch.randn(1, inputs).to(device, dtype) if with_residual else None
    norm = torch.rand(inputs).to(device, dtype) + 0.5
    offset = 1.0 if scale > 1 else None
    result, total = norm_gemv_triton(
        x, residual, norm, 1e-3, weight, bias, activation=activation, offset=offset
    )
    summed = x if residual is None else x + residual
    assert torch.equal(total, summed)
    # The kernel normalises the rounded sum; everything after it is computed in float64 here.
    normed = norm_in_float64(summed, norm, offset)
    tolerance = sum_tolerance(normed, weight, bias, activation) if dtype == torch.float32 else 0.0
    assert_close(result, float64_linear(normed, weight, bias, activation), tolerance=tolerance)


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("outputs", "inputs", "activation", "rows", "with_bias"),
    [
        # Each pair of values occurs with a bias and without.
        (*size, activation, rows, (i + j + k) % 2 == 1)
        for (i, size), (j, activation), (k, rows) in product(
            enumerate([(34, 40), (130, 256), (2, 5), (130, 1100), (34, 2500)]),
            enumerate([None, "silu", "gelu_pytorch_tanh"]),
            enumerate([1, 2, 16, 17, 64]),
        )
    ],
)
def test_a_skinny_gemm_equals_float64(device, dtype, outputs, inputs, with_bias, activation, rows):
    x, weight, bias = problem(device, dtype, rows, outputs, inputs)
    bias = bias if with_bias else None
    result = skinny_gemm_triton(x, weight, bias, activation=activation)
    tolerance = sum_tolerance(x, weight, bias, activation) if dtype == torch.float32 else 0.0
    assert_close(result, float64_linear(x, weight, bias, activation), tolerance=tolerance)


@pytest.mark.parametrize("activation", [None, "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rows", [1, 16])
def test_the_tolerance_is_that_of_sums_one_product_after_the_other(rows, activation):
    x, weight, _ = problem("cpu", torch.float32, rows, 34, 2500)
    total = torch.zeros(rows, 34)
    for a, b in zip(x.T.double(), weight.T.double(), strict=True):
        total = (total.double() + torch.outer(a, b)).float()
    result = total if activation is None else act_mul_reference(total.double(), activation)
    expected = float64_linear(x, weight, None, activation)
    error = float((result.double() - expected).norm() / expected.norm())
    assert 1 / 3 < error / (sum_tolerance(x, weight, None, activation) / 3) < 3
    # Of one row the gate makes more than the tolerance of other kernels.
    assert (error > TOLERANCE[torch.float32]) == (rows == 1 and activation is not None)


@pytest.mark.covering(1)
@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs", "splits"), [(34, 2048, 2), (130, 3100, 3), (70, 5000, 4), (8, 9000, 8)]
)
def test_split_k_equals_float64(device, dtype, monkeypatch, outputs, inputs, splits, with_bias, rows):
    monkeypatch.setattr(skinny_gemm, "num_sms", lambda device: splits * -(-outputs // 64))
    x, weight, bias = problem(device, dtype, rows, outputs, inputs)
    bias = bias if with_bias else None
    counters = split_counters(outputs, device)
    expected, tolerance = float64_linear(x, weight, bias), 0.0
    if dtype == torch.float32:
        tolerance = sum_tolerance(x, weight, bias)
    for _ in range(2):
        assert_close(skinny_gemm_triton(x, weight, bias, counters=counters), expected, tolerance=tolerance)
        assert not counters.any()
    sums = skinny_gemm_triton(x, weight, bias, parts=True)
    assert sums.shape == expected.shape and sums.dtype == dtype
    assert len(sums.parts) == splits
    # Not rounded yet.
    sum_error = {"tolerance": max(tolerance, 1e-6)} if dtype == torch.float32 else {}
    assert_close(sums.total(), expected, **sum_error)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(3, 16, 8), (300, 520, 200), (130, 512, 64)])
def test_a_gemm_with_activation_equals_float64(device, rows, outputs, inputs, with_bias, activation):
    """Sizes that end within a tile; TMA descriptors need rows at multiples of 16 bytes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight, bias = problem(device, dtype, rows, outputs, inputs, beyond=8)
    bias = bias if with_bias else None
    expected = gemm_activation_reference(*double(x, weight, bias), activation)
    assert_close(gemm_activation_triton(x, weight, bias, activation), expected)


def test_several_full_waves_of_tiles_fill_the_gpu():
    assert gemm_activation.fills_gpu(1600, 5120, 132) and gemm_activation.fills_gpu(25600, 5120, 132)
    # One wave, and three waves of which the last has tiles for a third of the SMs.
    assert not gemm_activation.fills_gpu(577, 4096, 132)
    assert not gemm_activation.fills_gpu(2308, 4096, 132)


@pytest.mark.gpu
def test_matrices_that_no_descriptor_fits_are_not_supported(device):
    if device.type == "cpu":
        pytest.skip("TMA descriptors need a GPU")
    x, weight = (torch.zeros(4096, 1283, dtype=torch.bfloat16, device=device)[:, 3:] for _ in range(2))
    assert not gemm_activation.supports(x, weight)
    assert gemm_activation.supports(x.contiguous(), weight.contiguous())
    assert not gemm_activation.supports(x.float().contiguous(), weight.float().contiguous())


@pytest.mark.parametrize("memory", [100 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [16, 64])
def test_the_pipeline_of_a_skinny_gemm_fits_the_memory_of_smaller_gpus(rows, gated, memory):
    sizes = {"gated": gated, "sms": 132, "memory": memory, "itemsize": 2}
    tile = skinny_gemm.choose_tile(rows, 1536, 8960, **sizes)
    assert tile.stages >= 2
    assert (64 * (2 if gated else 1) + rows) * tile.inputs * 2 * tile.stages <= memory


@pytest.mark.parametrize(("outputs", "inputs"), [(1536, 1536), (1536, 8960), (151936, 1536)])
def test_the_programs_of_a_gemv_fill_the_gpu(outputs, inputs):
    assert -(-outputs // gemv.choose_tile(outputs, inputs).outputs) >= 384
