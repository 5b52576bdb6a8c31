"""Linear layers with weights in 4 bits equal float64 with the dequantised weight, in each kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.kernels import dispatch, int4_gemm, int4_mma, int4_mma_ring, int4_unpack, int4_wgmma
from engine.kernels.int4 import (
    E2M1,
    Int4Scale,
    dequantise_int4,
    dequantise_int4_reference,
    dequantise_int4_triton,
    pack,
    unpack,
)
from engine.kernels.int4_gemm import int4_gemm_triton
from engine.kernels.int4_gemv import int4_gemv_triton
from engine.kernels.int4_mma import Int4Tile, int4_mma_gluon
from engine.kernels.int4_mma_ring import RingTile, int4_mma_ring_gluon
from engine.kernels.int4_wgmma import WgmmaTile, int4_wgmma_gluon
from engine.kernels.skinny_gemm import split_counters

from .compare import assert_close
from .test_linear import float64_linear, sum_tolerance

#: Outputs, inputs, and the inputs of a group: one group, or several, of which the last may be cut.
SIZES = [
    (34, 40, 40),
    (70, 1100, 128),
    (8, 1536, 1536),
    (5, 900, 16),
    (130, 72, 32),
    (66, 512, 256),
    (3, 400, 64),
]
#: The same with whole chunks of inputs.
CHUNKS = [
    (34, 128, 128),
    (70, 1152, 128),
    (8, 1536, 1536),
    (5, 896, 16),
    (130, 128, 32),
    (66, 512, 256),
    (3, 384, 64),
]
ZEROS = [True, False]
#: Kinds of floats, and the sizes that they have.
FLOATS = [("mxfp4", 32), ("nvfp4", 16)]
FLOAT_SIZES = [(34, 40), (70, 1100), (8, 1536), (3, 72)]


def problem(device, dtype, rows, outputs, inputs, group, zeros):
    """Return an input, words, scales, a bias, and the weight in float64.

    Numbers beyond the last input are not 0 in memory, and the input is within a wider one of NaN. Scales
    differ by a factor of several between outputs and between groups.
    """
    wide = torch.full((rows, inputs + 200), torch.nan, device=device, dtype=dtype)
    wide[:, :inputs] = torch.randn(rows, inputs)
    padded = torch.randint(0, 16, (outputs, -(-inputs // 128) * 128), dtype=torch.uint8)
    numbers, groups = padded[:, :inputs], -(-inputs // group)
    values = (torch.rand(outputs, groups) * 3 + 0.2) * inputs**-0.5 / 8
    points = torch.randint(0, 16, (outputs, groups), dtype=torch.uint8) if zeros else None
    scale = Int4Scale(inputs, values.to(device), group, None if points is None else points.to(device))
    zero = 8 if points is None else points.double().repeat_interleave(group, 1)[:, :inputs]
    exact = (numbers.double() - zero) * values.double().repeat_interleave(group, 1)[:, :inputs]
    bias = torch.randn(outputs).to(device, dtype)
    return wide[:, :inputs], pack(padded).to(device), scale, bias, exact.to(device)


def float_problem(device, dtype, rows, outputs, inputs, kind, group):
    """Return the same of floats, with scales of every exponent that fp8 has, subnormal ones included."""
    padded = torch.randint(0, 16, (outputs, -(-inputs // 128) * 128), dtype=torch.uint8)
    groups = -(-inputs // group)
    if kind == "mxfp4":
        values, factors = torch.randint(117, 124, (outputs, groups), dtype=torch.uint8), None
        exact_scale = torch.exp2(values.double() - 127)
    else:
        values = torch.randint(0, 127, (outputs, groups), dtype=torch.uint8)
        values[0, 0] |= 128
        factors = (torch.rand(outputs) + 0.5) / 448
        exact_scale = values.view(torch.float8_e4m3fn).double() * factors.double()[:, None]
    numbers = torch.tensor(E2M1, dtype=torch.float64)[padded[:, :inputs].long()]
    exact = numbers * exact_scale.repeat_interleave(group, 1)[:, :inputs]
    scale = Int4Scale(
        inputs,
        values.to(device),
        group,
        kind=kind,
        factors=None if factors is None else factors.to(device),
    )
    x, bias = torch.randn(rows, inputs).to(device, dtype), torch.randn(outputs).to(device, dtype)
    return x, pack(padded).to(device), scale, bias, exact.to(device)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("kind", "group"), FLOATS)
@pytest.mark.parametrize("size", FLOAT_SIZES, ids=str)
def test_floats(device, dtype, size, kind, group):
    """In every kernel; all numbers and scales are exact, but for the rounding of factors."""
    for rows in (1, 3, 20):
        x, words, scale, bias, exact = float_problem(device, dtype, rows, *size, kind, group)
        expected, close = float64_linear(x, exact, bias), tolerance(x, exact, bias)
        if rows == 1:
            assert_close(int4_gemv_triton(x, words, scale, bias), expected, tolerance=close)
        assert_close(int4_gemm_triton(x, words, scale, bias), expected, tolerance=close)
    wide = dequantise_int4_reference(words, scale, torch.float32)
    assert torch.equal(dequantise_int4_triton(words, scale, torch.float32), wide)
    torch.testing.assert_close(wide, exact.float(), rtol=3e-7 if kind == "nvfp4" else 0, atol=0)


def tolerance(x, exact, bias):
    # With zero points the kernel of one row sums numbers and subtracts zero points at the end of a group.
    return 16 * sum_tolerance(x, exact, bias) if x.dtype == torch.float32 else 0.0


def run_assembly(text: str, *operands: int) -> int:
    """Interpret assembly of a kernel: ``$0`` is its result, ``$1`` and so on are operands, of 32 bits."""
    values = {f"${index}": value for index, value in enumerate(operands, 1)}

    def read(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    def halves(value: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([value & 0xFFFF, value >> 16]).to(torch.uint16).view(dtype).double()

    for line in text.strip("{} \n").split(";"):
        name, *names = line.replace(",", " ").split() or [".reg"]
        if name == ".reg":
            continue
        target, *sources = names
        args = [read(source) for source in sources]
        if name == "mov.b32":
            result = args[0]
        elif name in ("shl.b32", "shr.u32"):
            result = args[0] << args[1] if name == "shl.b32" else args[0] >> args[1]
        elif name == "and.b32":
            result = args[0] & args[1]
        elif name == "lop3.b32":
            assert args[3] == 0xEA
            result = args[0] & args[1] | args[2]
        else:
            dtype = {"fma.rn.bf16x2": torch.bfloat16, "fma.rn.f16x2": torch.float16}[name]
            a, b, c = (halves(value, dtype) for value in args)
            # Exact in float64, so that it is rounded once.
            bits = (a * b + c).to(dtype).view(torch.uint16).tolist()
            result = bits[1] << 16 | bits[0]
        values[target] = result & 0xFFFFFFFF
    return values["$0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_assembly_unpacks_two_numbers(dtype):
    """On a CPU kernels unpack otherwise."""
    bf16 = dtype == torch.bfloat16
    integers = int4_unpack._INTEGERS_BF16 if bf16 else int4_unpack._INTEGERS_FP16
    floats = int4_unpack._FLOATS_BF16 if bf16 else int4_unpack._FLOATS_FP16
    for number in range(16):
        other, zero = 15 - number, (7 * number + 3) % 16
        minus = (0xC300 if bf16 else 0xE400) + zero
        for i in range(4):
            # Beside them the words have numbers that differ.
            low, high = (value << 4 * i | 15 - value << 4 * (i ^ 1) for value in (number, other))
            for text, expected in (
                (integers.value[i], [number - zero, other - zero]),
                (floats.value[i], [E2M1[number], E2M1[other]]),
            ):
                result = run_assembly(text, high << 16 | low, minus << 16 | minus)
                found = torch.tensor([result & 0xFFFF, result >> 16]).to(torch.uint16).view(dtype)
                assert found.tolist() == expected


def test_the_order_of_numbers():
    numbers = torch.randint(0, 16, (3, 300), dtype=torch.uint8)
    words = pack(numbers)
    assert words.dtype == torch.int16 and words.shape == (3, 96)
    assert torch.equal(unpack(words, 300), numbers)
    for chunk, word, place in ((0, 0, 0), (1, 5, 3), (0, 31, 2), (2, 11, 1)):
        found = words[:, chunk * 32 + word] >> (4 * place) & 15
        assert found.tolist() == numbers[:, chunk * 128 + place * 32 + word].tolist()


@pytest.mark.covering(1)
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dequantised(device, size, zeros):
    _, words, scale, _, exact = problem(device, torch.float32, 1, *size, zeros)
    for run in (dequantise_int4, dequantise_int4_reference, dequantise_int4_triton):
        wide = run(words, scale, torch.float32)
        assert torch.equal(wide, exact.float()) and wide.is_contiguous()


@pytest.mark.covering(1)
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("size", [*SIZES, (1, 8, 8), (2, 9000, 128)], ids=str)
def test_one_row(device, dtype, size, zeros):
    x, words, scale, bias, exact = problem(device, dtype, 1, *size, zeros)
    bias = bias if zeros else None
    expected = float64_linear(x, exact, bias)
    assert_close(int4_gemv_triton(x, words, scale, bias), expected, tolerance=tolerance(x, exact, bias))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "scales", "rows", "zeros", "tile"),
    [
        (torch.bfloat16, torch.bfloat16, 1, True, None),
        (torch.bfloat16, torch.float16, 16, False, None),
        (torch.bfloat16, torch.float32, 3, True, Int4Tile(32, 4, 2, 1)),
        (torch.float16, torch.float16, 5, True, Int4Tile(16, 1, 8, 3)),
        (torch.float16, torch.float32, 1, False, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", CHUNKS, ids=str)
def test_a_few_rows(hopper, monkeypatch, dtype, scales, size, rows, zeros, tile):
    """On tensor cores, which sum in float32: as near as the rounding of the result."""
    if tile is not None:
        monkeypatch.setattr(int4_mma, "choose_tile", lambda *_, **__: tile)
    x, words, scale, bias, exact = problem(hopper, dtype, rows, *size, zeros)
    bias, values = bias if zeros else None, scale.values.to(scales)
    exact *= (values.double() / scale.values.double()).repeat_interleave(size[2], 1)[:, : size[1]]
    scale = replace(scale, values=values)
    # Nearly equal inputs: what is added to a number in its register must not be left in the sums.
    for rows_of_x in (x, x * 2**-8 + 1):
        result = int4_mma_gluon(rows_of_x, words, scale, bias)
        expected = float64_linear(rows_of_x, exact, bias)
        error = (result.double() - expected).norm() / expected.norm()
        assert error < (3e-3 if dtype == torch.bfloat16 else 4e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "group"), FLOATS)
@pytest.mark.parametrize(("size", "rows"), [((34, 128), 1), ((70, 1152), 16), ((66, 4096), 1)], ids=str)
def test_floats_of_a_few_rows(hopper, dtype, size, rows, kind, group):
    x, words, scale, bias, exact = float_problem(hopper, dtype, rows, *size, kind, group)
    result, expected = int4_mma_gluon(x, words, scale, bias), float64_linear(x, exact, bias)
    error = (result.double() - expected).norm() / expected.norm()
    assert error < (3e-3 if dtype == torch.bfloat16 else 4e-4)


def paired_problem(device, dtype, rows, outputs, inputs, group, zeros):
    """Return :func:`problem` with pairs of scales, in the other dtype of 16 bits, and zero points."""
    x, words, scale, bias, _ = problem(device, dtype, rows, outputs, inputs, group, zeros)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    scale = replace(scale, values=scale.values.to(other)).paired()
    return x, words, scale, bias, dequantise_int4_reference(words, scale, torch.float32).double()


#: Sizes with groups of whole chunks, or one group.
WHOLE = [size for size in CHUNKS if size[2] % 128 == 0 or size[2] == size[1]]


def check_few_rows(run, x, words, scale, bias, exact):
    # Nearly equal inputs: what is added to a number in its register must not be left in the sums.
    for rows_of_x in (x, x * 2**-8 + 1):
        expected = float64_linear(rows_of_x, exact, bias)
        for _ in range(2):
            result = run(rows_of_x, words, scale, bias)
            error = (result.double() - expected).norm() / expected.norm()
            assert error < (3e-3 if x.dtype == torch.bfloat16 else 4e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [None, RingTile(32, 8, 2, 6), RingTile(16, 1, 4, 3)], ids=str)
@pytest.mark.parametrize(("size", "zeros"), [*((size, True) for size in WHOLE), (WHOLE[1], False)], ids=str)
def test_the_ring_of_a_row(hopper, monkeypatch, dtype, size, zeros, tile):
    if tile is not None:
        monkeypatch.setattr(int4_mma_ring, "choose_tile", lambda *_: tile)
    for rows in (1, 2, 3, 4, 8):
        check_few_rows(int4_mma_ring_gluon, *paired_problem(hopper, dtype, rows, *size, zeros))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [None, WgmmaTile(64, 16, 3, 3), WgmmaTile(128, 64, 4, 2)], ids=str)
@pytest.mark.parametrize(("size", "zeros"), [*((size, True) for size in WHOLE), (WHOLE[1], False)], ids=str)
def test_the_ring_of_some_rows(hopper, monkeypatch, dtype, size, zeros, tile):
    if tile is not None:
        monkeypatch.setattr(int4_wgmma, "choose_tile", lambda *_: tile)
    # Each tile of outputs has them for two tiles of rows; the first tile here has four, as no chosen one has.
    counters = split_counters(2 * 64 * -(-size[0] // 64), hopper)
    run = partial(int4_wgmma_gluon, counters=counters)
    for rows in (1, 16, 17, 64) if tile is not None else (1, 8, 16, 17, 64, 65, 128, 130, 256):
        check_few_rows(run, *paired_problem(hopper, dtype, rows, *size, zeros))
        assert counters.eq(0).all()


@pytest.mark.covering(2)
@pytest.mark.parametrize("rows", [1, 2, 17, 70])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_some_rows(device, dtype, size, zeros, rows):
    x, words, scale, bias, exact = problem(device, dtype, rows, *size, zeros)
    bias = None if zeros else bias
    expected = float64_linear(x, exact, bias)
    assert_close(int4_gemm_triton(x, words, scale, bias), expected, tolerance=tolerance(x, exact, bias))


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(34, 2048, 2048), (130, 3100, 128)])
def test_split_k(device, dtype, monkeypatch, outputs, inputs, group):
    monkeypatch.setattr(int4_gemm, "num_sms", lambda device: 3 * -(-outputs // 64))
    x, words, scale, bias, exact = problem(device, dtype, 5, outputs, inputs, group, True)
    counters = split_counters(outputs, device)
    for _ in range(2):
        result = int4_gemm_triton(x, words, scale, bias, counters=counters)
        assert_close(result, float64_linear(x, exact, bias), tolerance=tolerance(x, exact, bias))
    assert counters.eq(0).all()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_the_operation(device, dtype, rows, activation):
    x, words, scale, bias, exact = problem(device, dtype, rows, 40, 256, 128, True)
    expected = float64_linear(x, exact, bias, activation)
    result = dispatch.linear(x, words, bias, activation=activation, scale=scale)
    assert_close(
        result,
        expected,
        tolerance=16 * sum_tolerance(x, exact, bias, activation) if dtype == torch.float32 else 0,
    )
    norm, residual = torch.rand(256).to(device, dtype) + 0.5, torch.randn(rows, 256).to(device, dtype)
    found, total = dispatch.norm_linear(
        x, residual, norm, 1e-5, words, bias, activation=activation, scale=scale
    )
    assert torch.equal(total, x + residual)
    normed = (
        total.double() * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + 1e-5) * norm.double()
    )
    expected = float64_linear(normed, exact, bias, activation)
    assert_close(found, expected, tolerance=3e-5 if dtype == torch.float32 else 0)


@pytest.mark.parametrize(
    ("rows", "dtype", "triton", "hopper", "scales", "expected"),
    [
        (1, torch.bfloat16, True, False, torch.float16, "int4_gemv_triton"),
        (2, torch.bfloat16, True, True, torch.float16, "int4_mma_ring_gluon"),
        (4, torch.float16, True, True, torch.bfloat16, "int4_mma_ring_gluon"),
        (5, torch.float16, True, True, torch.bfloat16, "int4_wgmma_gluon"),
        (64, torch.bfloat16, True, True, torch.float16, "int4_wgmma_gluon"),
        # Of 32 bits.
        (1, torch.bfloat16, True, True, torch.float32, "int4_mma_gluon"),
        (16, torch.float16, True, True, torch.float32, "int4_mma_gluon"),
        (17, torch.bfloat16, True, True, torch.float32, "int4_gemm_triton"),
        (1, torch.float32, True, True, torch.float16, "int4_gemv_triton"),
        (2, torch.bfloat16, True, False, torch.float16, "int4_gemm_triton"),
        (65, torch.bfloat16, True, True, torch.float16, "int4_wgmma_gluon"),
        (256, torch.bfloat16, True, True, torch.float16, "int4_wgmma_gluon"),
        (257, torch.bfloat16, True, True, torch.float16, "dequantise_int4"),
        (128, torch.bfloat16, True, True, torch.float32, "int4_gemm_triton"),
        (129, torch.bfloat16, True, True, torch.float32, "dequantise_int4"),
        (2, torch.float32, True, True, torch.float16, "dequantise_int4"),
        (1, torch.float32, False, False, torch.float16, "dequantise_int4"),
        (1, torch.bfloat16, False, True, torch.float16, "dequantise_int4"),
    ],
)
def test_the_choice_among_kernels(monkeypatch, rows, dtype, triton, hopper, scales, expected):
    called = []

    def replaced(name):
        return lambda *_, **__: called.append(name) or torch.zeros(1, 128, dtype=dtype)

    kernels = (
        "int4_mma_ring_gluon",
        "int4_wgmma_gluon",
        "int4_mma_gluon",
        "int4_gemv_triton",
        "int4_gemm_triton",
    )
    for name in (*kernels, "dequantise_int4"):
        monkeypatch.setattr(dispatch, name, replaced(name))
    monkeypatch.setattr(dispatch, "use_triton", lambda _: triton)
    for module in (int4_mma_ring, int4_wgmma, int4_mma):
        monkeypatch.setattr(module, "is_hopper", lambda _: hopper)
    scale = Int4Scale(128, torch.ones(1, 1, dtype=scales), 128).paired()
    dispatch.linear(torch.zeros(rows, 128, dtype=dtype), torch.zeros(1, 32, dtype=torch.int16), scale=scale)
    assert called == [expected]


def test_more_rows_of_many_outputs_take_the_ring(monkeypatch):
    monkeypatch.setattr(int4_mma_ring, "is_hopper", lambda _: True)
    for outputs, most in ((1 << 15, 4), ((1 << 15) + 1, 8)):
        scale = Int4Scale(128, torch.ones(outputs, 1).half(), 128).paired()
        taken = [rows for rows in range(20) if int4_mma_ring.supports(torch.zeros(rows, 128).half(), scale)]
        assert taken == list(range(1, most + 1))
