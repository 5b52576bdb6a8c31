import pytest
import torch

from engine.kernels.skinny_linear import (
    MAX_ROWS,
    skinny_linear,
    skinny_linear_reference,
    skinny_linear_triton,
    tiling,
)

from .compare import assert_close


def problem(device, dtype, rows, outputs, inputs):
    """Parts of wider tensors, whose other elements are NaN."""
    wide = torch.full((rows, inputs + 5), torch.nan, device=device, dtype=dtype)
    weight = torch.full((outputs + 1, inputs + 8), torch.nan, device=device, dtype=dtype)
    wide[:, :inputs] = torch.randn(rows, inputs)
    weight[:outputs, :inputs] = torch.randn(outputs, inputs) * inputs**-0.5
    return wide[:, :inputs], weight[:outputs, :inputs], torch.randn(outputs).to(device, dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize(("outputs", "inputs"), [(33, 40), (70, 1100), (8, 1536)])
def test_triton_equals_float64(device, dtype, rows, outputs, inputs, with_bias):
    x, weight, bias = problem(device, dtype, rows, outputs, inputs)
    bias = bias if with_bias else None
    wanted = skinny_linear_reference(x.double(), weight.double(), bias.double() if with_bias else None)
    assert_close(skinny_linear_triton(x, weight, bias), wanted)


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_do_not_depend_on_each_other(device, dtype, rows):
    x, weight, bias = problem(device, dtype, 5, 40, 600)
    first = skinny_linear_triton(x[:rows], weight, bias)
    x[1:] = 0
    assert torch.equal(skinny_linear_triton(x[:rows], weight, bias)[0], first[0])


def test_without_rows(device):
    x, weight, bias = problem(device, torch.float32, 0, 12, 16)
    assert skinny_linear_triton(x, weight, bias).shape == (0, 12)


def test_many_rows_are_left_to_torch(device, dtype):
    x, weight, bias = problem(device, dtype, MAX_ROWS + 1, 12, 16)
    torch.testing.assert_close(skinny_linear(x, weight, bias), skinny_linear_reference(x, weight, bias))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("outputs", "inputs"), [(1536, 1536), (1536, 8960), (17920, 1536), (151936, 1536)])
def test_splits_fill_the_gpu_and_none_is_empty(rows, outputs, inputs):
    tile = tiling(rows, outputs, inputs, 2)
    programs = -(-outputs // tile.outputs)
    assert tile.splits == 1 if programs >= 512 else programs * tile.splits >= 256
    tiles = -(-inputs // tile.inputs)
    assert (tile.splits - 1) * -(-tiles // tile.splits) < tiles
