import pytest
import torch

from engine.kernels import dispatch, ring_gemm
from engine.kernels.dispatch import linear, split_linear
from engine.kernels.fp8 import FP8, RoundedRows, Scale, quantise_rows_reference
from engine.kernels.ring_gemm import RingTile, choose_tile, ring_gemm_gluon, supports, tile_gemm_gluon

from .compare import assert_close
from .test_linear import float64_linear


def problem(device, rows, outputs, inputs):
    x = torch.randn(rows, inputs + 8, device=device, dtype=torch.bfloat16)[:, :inputs]
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
    return x, weight, torch.randn(outputs, device=device, dtype=torch.bfloat16)


#: Ends within a tile, within a step, within a share, and shares without inputs.
SIZES = [(64, 512), (200, 1000), (1536, 1536), (1536, 8960)]
TILES = [None, RingTile(128, 9, 11), RingTile(64, 3, 2), RingTile(64, 13, 7)]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("rows", [2, 17, 64])
def test_the_total_equals_float64(hopper, monkeypatch, rows, outputs, inputs, tile):
    if tile is not None:
        monkeypatch.setattr(ring_gemm, "choose_tile", lambda *_, **__: tile)
    x, weight, bias = problem(hopper, rows, outputs, inputs)
    for given in (None, bias):
        expected = float64_linear(x, weight, given)
        for _ in range(5):
            sums = ring_gemm_gluon(x, weight, given)
            assert sums.shape == expected.shape and sums.dtype == x.dtype
            assert_close(sums.parts.sum(0), expected, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(200, 1040), (3584, 3584), (80, 18944)])
@pytest.mark.parametrize("rows", [2, 17, 64, 65, 200, 256])
def test_the_total_of_rounded_rows_equals_float64(hopper, monkeypatch, rows, outputs, inputs, tile):
    if tile is not None:
        monkeypatch.setattr(ring_gemm, "choose_tile", lambda *_, **__: tile)
    x, _, bias = problem(hopper, rows, outputs, inputs)
    numbers, row_scale = quantise_rows_reference(x)
    weight = (torch.randn(outputs, inputs, device=hopper) * 30).to(FP8)
    scale = Scale((torch.rand(outputs, 1, device=hopper) + 0.5) * inputs**-0.5 / 30, inputs, True)
    expected = float64_linear(
        numbers.double() * row_scale.double(), weight.double() * scale.values.double(), bias.double()
    )
    for _ in range(5):
        sums = ring_gemm_gluon(numbers, weight, bias, scale=scale, row_scale=row_scale, dtype=torch.bfloat16)
        # The tensor cores keep 14 bits of a sum over 128 products.
        assert_close(sums.parts.sum(0), expected, tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "inputs"), [(200, 2048), (4608, 3584), (80, 8192), (64, 2064)])
@pytest.mark.parametrize("rows", [17, 64])
def test_programs_with_a_tile_to_themselves_equal_float64(hopper, rows, outputs, inputs):
    x, _, bias = problem(hopper, rows, outputs, inputs)
    numbers, row_scale = quantise_rows_reference(x)
    weight = (torch.randn(outputs, inputs, device=hopper) * 30).to(FP8)
    scale = Scale((torch.rand(outputs, 1, device=hopper) + 0.5) * inputs**-0.5 / 30, inputs, True)
    exact = numbers.double() * row_scale.double(), weight.double() * scale.values.double()
    for given in (None, bias):
        expected = float64_linear(*exact, None if given is None else given.double())
        for _ in range(5):
            options = {"scale": scale, "row_scale": row_scale, "dtype": torch.bfloat16}
            result = tile_gemm_gluon(numbers, weight, given, **options)
            assert result.dtype == torch.bfloat16 and result.shape == expected.shape
            # The tensor cores keep 14 bits of all sums.
            assert_close(result, expected, tolerance=4e-3)


def test_projections_of_17_to_64_rounded_rows_have_a_tile_a_program(monkeypatch):
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(ring_gemm, "is_hopper", lambda _: True)
    monkeypatch.setattr(ring_gemm, "num_sms", lambda _: 4)
    taken = []
    monkeypatch.setattr(dispatch, "tile_gemm_gluon", lambda x, *_, **__: taken.append(len(x)))
    monkeypatch.setattr(dispatch, "skinny_gemm_triton", lambda *_, **__: None)
    weight, scale = torch.zeros(320, 2048).to(FP8), Scale(torch.ones(320, 1), 2048, True)
    for rows in (16, 17, 64):
        numbers = RoundedRows.empty(rows, 2048, torch.device("cpu"))
        linear(numbers, weight[:256], scale=scale)
        # Of too many and too few outputs, with a gate, and with split-K.
        linear(numbers, weight, scale=scale)
        linear(numbers, weight[:64], scale=scale)
        linear(numbers, weight[:256], scale=scale, activation="silu")
        linear(numbers, weight[:256], scale=scale, counters=torch.zeros(4))
        few = RoundedRows.empty(rows, 1024, torch.device("cpu"))
        linear(few, weight[:256, :1024].contiguous(), scale=scale)
    assert taken == [17, 64]


@pytest.mark.parametrize("hopper_gpu", [False, True])
def test_a_few_rows_on_hopper_gpus_take_it(monkeypatch, hopper_gpu):
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(ring_gemm, "is_hopper", lambda _: hopper_gpu)
    taken = []
    monkeypatch.setattr(dispatch, "ring_gemm_gluon", lambda x, *_, **__: taken.append(len(x)))
    monkeypatch.setattr(dispatch, "skinny_gemm_triton", lambda *_, **__: None)
    for rows in (2, 64):
        x, weight, _ = problem("cpu", rows, 272, 1024)
        split_linear(x, weight)
        # For a consumer that adds nothing up, and with few inputs.
        linear(x, weight)
        split_linear(x[:, :512], weight[:, :512])
    monkeypatch.setattr(dispatch, "linear", lambda *_, **__: None)
    rounded = torch.zeros(16, 8192).to(FP8)
    for rows in (65, 256, 257):
        numbers = RoundedRows.empty(rows, 8192, torch.device("cpu"))
        split_linear(numbers, rounded, scale=Scale(torch.ones(16, 1), 8192, True))
    for rows in (1, 65):
        split_linear(*problem("cpu", rows, 16, 1024)[:2])
    assert taken == ([2, 64, 65, 256] if hopper_gpu else [])


def test_only_matrices_that_a_descriptor_can_describe_are_supported(monkeypatch):
    monkeypatch.setattr(ring_gemm, "is_hopper", lambda _: True)
    x, weight, _ = problem("cpu", 2, 16, 1024)
    assert supports(x, weight)
    assert not supports(x.float(), weight.float())
    assert not supports(x[:, 1:1017], weight[:, :1016])
    assert not supports(x, torch.empty(16, 1028, dtype=x.dtype)[:, :1024])


@pytest.mark.parametrize(
    ("outputs", "inputs", "itemsize"), [(1536, 1536, 2), (3584, 18944, 1), (16, 1024, 2)]
)
def test_programs_share_the_inputs(outputs, inputs, itemsize):
    for rows in (2, 64, 256) if itemsize == 1 else (2, 64):
        tile = choose_tile(rows, outputs, inputs, itemsize=itemsize, sms=132)
        assert tile.splits >= 2 and (tile.outputs + tile.rows) * 128 * tile.depth <= 220 << 10
