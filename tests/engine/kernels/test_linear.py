import pytest
import torch

from engine.kernels import few_rows, many_rows
from engine.kernels.activation import ACTIVATIONS
from engine.kernels.few_rows import few_rows_linear_triton
from engine.kernels.linear import arrivals_of, linear, linear_reference, linear_triton, tiling
from engine.kernels.many_rows import activated_linear_reference, activated_linear_triton
from engine.kernels.norm_linear import norm_linear, norm_linear_reference, norm_linear_triton

from .compare import assert_close

SIZES = [(34, 40), (70, 1100), (8, 1536), (4, 9000), (202, 65)]


def problem(device, dtype, rows, outputs, inputs, beyond=5):
    """Parts of wider tensors, whose other elements are NaN."""
    wide = torch.full((rows, inputs + beyond), torch.nan, device=device, dtype=dtype)
    weight = torch.full((outputs + 1, inputs + 8), torch.nan, device=device, dtype=dtype)
    wide[:, :inputs] = torch.randn(rows, inputs)
    weight[:outputs, :inputs] = torch.randn(outputs, inputs) * inputs**-0.5
    return wide[:, :inputs], weight[:outputs, :inputs], torch.randn(outputs).to(device, dtype)


def double(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [*SIZES, (1, 5), (33, 512)])
def test_triton_equals_float64(device, dtype, outputs, inputs, with_bias):
    x, weight, bias = problem(device, dtype, 1, outputs, inputs)
    bias = bias if with_bias else None
    wanted = linear_reference(*double(x, weight, bias))
    assert_close(linear_triton(x, weight, bias), wanted)


@pytest.mark.parametrize("scale", [0.01, 30.0])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_after_a_norm_triton_equals_float64(device, dtype, outputs, inputs, with_residual, activation, scale):
    x, weight, bias = problem(device, dtype, 1, outputs, inputs)
    x *= scale
    residual = torch.randn(1, inputs).to(device, dtype) if with_residual else None
    norm = torch.rand(inputs).to(device, dtype) + 0.5
    found, total = norm_linear_triton(x, residual, norm, 1e-3, weight, bias, activation=activation)
    summed = x if residual is None else x + residual
    assert torch.equal(total, summed)
    # The sum is rounded, as it is kept.
    wide = double(summed, None, norm)
    wanted, _ = norm_linear_reference(*wide, 1e-3, *double(weight, bias), activation=activation)
    assert_close(found, wanted)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(34, 40), (130, 256), (2, 5), (202, 1100), (34, 2500)])
def test_a_few_rows_equal_float64(device, dtype, outputs, inputs, with_bias, activation, rows):
    x, weight, bias = problem(device, dtype, rows, outputs, inputs)
    bias = bias if with_bias else None
    wanted = linear(*double(x, weight, bias), activation=activation)
    assert_close(few_rows_linear_triton(x, weight, bias, activation=activation), wanted)


@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs", "splits"), [(34, 2048, 2), (130, 3100, 3), (70, 5000, 4), (8, 9000, 8)]
)
def test_programs_that_share_inputs_equal_float64(
    device, dtype, monkeypatch, outputs, inputs, splits, with_bias, rows
):
    monkeypatch.setattr(few_rows, "num_processors", lambda device: splits * -(-outputs // 64))
    x, weight, bias = problem(device, dtype, rows, outputs, inputs)
    bias = bias if with_bias else None
    arrivals = arrivals_of(outputs, device)
    wanted = linear(*double(x, weight, bias))
    for _ in range(2):
        assert_close(few_rows_linear_triton(x, weight, bias, arrivals=arrivals), wanted)
        assert not arrivals.any()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(3, 16, 8), (300, 520, 200), (130, 512, 64)])
def test_many_rows_equal_float64(device, rows, outputs, inputs, with_bias, activation):
    """Sizes that end within a tile. The descriptors of the kernel take rows at multiples of 16 bytes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight, bias = problem(device, dtype, rows, outputs, inputs, beyond=8)
    bias = bias if with_bias else None
    wanted = activated_linear_reference(*double(x, weight, bias), activation)
    assert_close(activated_linear_triton(x, weight, bias, activation), wanted)


@pytest.mark.parametrize("busy", [False, True])
def test_an_activated_layer_takes_the_kernel_where_it_pays(device, monkeypatch, busy):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    launched = []

    def kernel(x, *given):
        launched.append(x.shape)
        return activated_linear_triton(x, *given)

    monkeypatch.setattr(many_rows, "can_take", lambda *_: True)
    monkeypatch.setattr(many_rows, "keeps_busy", lambda *_: busy)
    monkeypatch.setattr(many_rows, "activated_linear_triton", kernel)
    x, weight, bias = problem(device, dtype, 10, 16, 8, beyond=8)
    x = x.contiguous().unflatten(0, (2, 5))
    found = many_rows.activated_linear(x, weight, bias, "gelu")
    assert launched == ([(10, 8)] if busy else [])
    assert_close(found, activated_linear_reference(*double(x, weight, bias), "gelu"))


def test_many_rows_are_ours_where_they_fill_the_gpu():
    assert many_rows.keeps_busy(1600, 5120, 132) and many_rows.keeps_busy(25600, 5120, 132)
    # One round, and three of which the last has a third of the processors.
    assert not many_rows.keeps_busy(577, 4096, 132)
    assert not many_rows.keeps_busy(2308, 4096, 132)


@pytest.mark.gpu
def test_what_descriptors_cannot_describe_is_left_to_torch(device):
    if device.type == "cpu":
        pytest.skip("descriptors are a GPU's")
    x, weight = (torch.zeros(4096, 1283, dtype=torch.bfloat16, device=device)[:, 3:] for _ in range(2))
    assert not many_rows.can_take(x, weight) and many_rows.can_take(x.contiguous(), weight.contiguous())
    assert not many_rows.can_take(x.float().contiguous(), weight.float().contiguous())


def test_many_rows_are_left_to_torch(device, dtype):
    x, weight, bias = problem(device, dtype, 65, 12, 16)
    torch.testing.assert_close(linear(x, weight, bias), linear_reference(x, weight, bias))
    norm, residual = torch.rand(16).to(device, dtype), x.clone()
    found = norm_linear(x, residual, norm, 1e-3, weight, bias, activation="silu")
    wanted = norm_linear_reference(x, residual, norm, 1e-3, weight, bias, activation="silu")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("memory", [100 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [16, 64])
def test_a_few_rows_fit_into_the_memory_of_smaller_gpus(rows, gated, memory):
    sizes = {"gated": gated, "processors": 132, "memory": memory, "itemsize": 2}
    tile = few_rows.tiling(rows, 1536, 8960, **sizes)
    assert tile.stages >= 2
    assert (64 * (2 if gated else 1) + rows) * tile.inputs * 2 * tile.stages <= memory


def test_no_rows(device):
    x, weight, bias = problem(device, torch.float32, 0, 12, 16)
    assert linear(x, weight, bias).shape == (0, 12)
    out, total = norm_linear(x, x, torch.ones(16, device=device), 1e-3, weight, activation="silu")
    assert out.shape == (0, 6) and total.shape == (0, 16)


@pytest.mark.parametrize(("outputs", "inputs"), [(1536, 1536), (1536, 8960), (151936, 1536)])
def test_programs_fill_the_gpu(outputs, inputs):
    assert -(-outputs // tiling(outputs, inputs).outputs) >= 384
