"""The choice among kernels, and the table that describes it."""

import re
from pathlib import Path

import pytest
import torch

from engine import kernels
from engine.kernels import dispatch, gemm_activation
from engine.kernels.dispatch import (
    LONG_PROMPT,
    MIDDLE_PROMPT,
    SHORT_PROMPT,
    activated_linear,
    linear,
    norm_linear,
    paged_attention,
    split_linear,
)
from engine.kernels.gemm_activation import gemm_activation_reference, gemm_activation_triton
from engine.kernels.image_plan import ImagePlan
from engine.kernels.launch import compiling
from engine.kernels.norm_gemv import norm_linear_reference

from .compare import assert_close
from .test_linear import double, problem
from .test_paged_attention import problem as paged_problem

FOLDER = Path(kernels.__path__[0])


def spy(monkeypatch, *names):
    """Replace kernels in dispatch; return the list of names that are called."""
    called = []
    for name in names:
        monkeypatch.setattr(dispatch, name, lambda *_, name=name, **__: called.append(name))
    return called


@pytest.mark.parametrize(
    ("longest", "options", "expected"),
    [
        (LONG_PROMPT + 1, {}, "prefill_attention_gluon"),
        (SHORT_PROMPT + 1, {}, "prefill_attention_gluon"),
        (SHORT_PROMPT, {}, "paged_attention_triton"),
        (LONG_PROMPT + 1, {"window": 9}, "paged_attention_triton"),
        (LONG_PROMPT + 1, {"cap": 50.0}, "paged_attention_triton"),
        (LONG_PROMPT + 1, {"many": True}, "paged_attention_triton"),
    ],
)
def test_prompts_that_are_not_short_take_the_prefill_kernel(monkeypatch, longest, options, expected):
    q, paged = paged_problem(
        "cpu", torch.float32, lengths=[5], queries=[5], heads=2, kv_heads=1, dim=16, block_size=4
    )
    paged.meta.max_query_len, paged.meta.many_sequences = longest, options.pop("many", False)
    called = spy(
        monkeypatch, "prefill_attention_gluon", "paged_attention_triton", "paged_attention_reference"
    )
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(dispatch.prefill_attention, "supports", lambda *_: True)
    paged_attention(q, paged.cache, paged.meta, scale=1.0, **options)
    assert called == [expected]


@pytest.mark.parametrize(
    ("longest", "dim", "tokens", "expected"),
    [
        (LONG_PROMPT, 64, 1056, [True]),
        (LONG_PROMPT, 64, 1057, []),
        (LONG_PROMPT, 128, 9000, [True]),
        (MIDDLE_PROMPT, 128, 2112, [True]),
        (MIDDLE_PROMPT, 128, 2113, []),
        (LONG_PROMPT + 1, 64, 9000, [False]),
    ],
)
def test_prompts_of_middle_lengths_take_pairs_of_tiles_unless_they_are_many(
    monkeypatch, longest, dim, tokens, expected
):
    _, paged = paged_problem(
        "cpu", torch.float32, lengths=[5], queries=[5], heads=2, kv_heads=1, dim=16, block_size=4
    )
    paged.meta.max_query_len = longest
    given = []
    spy(monkeypatch, "paged_attention_triton")
    monkeypatch.setattr(
        dispatch, "prefill_attention_gluon", lambda *_, **options: given.append(options["paired"])
    )
    monkeypatch.setattr(dispatch, "num_sms", lambda _: 132)
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(dispatch.prefill_attention, "supports", lambda *_: True)
    paged_attention(torch.zeros(tokens, 16, dim), paged.cache, paged.meta, scale=1.0)
    assert given == expected


def test_start_up_compiles_attention_of_one_sequence_and_of_several(monkeypatch):
    """Of several, tokens that are their sequence's one new token have a kernel of their own."""
    given = []
    spy(monkeypatch, "single_attention_gluon")
    monkeypatch.setattr(
        dispatch, "paged_attention_triton", lambda *_, singles=True, **__: given.append(singles)
    )
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(dispatch.fp8_attention, "supports", lambda *_: True)
    for lengths in ([5], [5, 3]):
        sizes = {"heads": 2, "kv_heads": 1, "dim": 16, "block_size": 4}
        q, paged = paged_problem("cpu", torch.float32, lengths=lengths, queries=lengths, **sizes)
        paged_attention(q, paged.cache, paged.meta, scale=1.0)
    assert given == [True, False]
    with compiling():
        paged_attention(q, paged.cache, paged.meta, scale=1.0)
    assert given[2:] == [True, False]


@pytest.mark.parametrize(
    ("segments", "counted", "expected"),
    [
        ([2304], True, [ImagePlan(shares=True)]),
        ([2304], False, [ImagePlan()]),
        ([1444], True, [ImagePlan(groups=3)]),
        ([1600] * 16, False, [ImagePlan()]),
        ([576], True, ["vision_attention_triton"]),
        ([], True, ["vision_attention_triton"]),
    ],
)
def test_images_choose_by_their_lengths(monkeypatch, segments, counted, expected):
    q = torch.zeros(sum(segments), 16, 80, dtype=torch.bfloat16)
    bounds = torch.tensor([0, *segments]).cumsum(0).int()
    called = spy(monkeypatch, "vision_attention_triton")
    monkeypatch.setattr(dispatch, "image_attention_gluon", lambda *_, plan, **__: called.append(plan))
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(dispatch, "num_sms", lambda _: 132)
    monkeypatch.setattr(dispatch.image_attention, "supports", lambda *_: True)
    counters = bounds if counted else None
    dispatch.vision_attention(q, q, q, bounds, max_len=max(segments, default=0), scale=1.0, counters=counters)
    assert called == expected


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "dtype", "expected"),
    [
        (1, 64, 8, torch.bfloat16, ["gemv_triton"]),
        (1, 64, 8, torch.float32, ["gemv_triton"]),
        (2, 64, 16, torch.bfloat16, ["skinny_gemm_triton"]),
        (64, 64, 48, torch.bfloat16, ["skinny_gemm_triton"]),
        (2, 64, 40, torch.bfloat16, []),
        (2, 64, 16, torch.float32, []),
        (65, 64, 16, torch.bfloat16, []),
        (2, dispatch.MAX_SKINNY_OUTPUTS + 1, 16, torch.bfloat16, []),
        (0, 64, 16, torch.bfloat16, []),
    ],
)
def test_linear_layers_choose_by_sizes_and_dtype(monkeypatch, rows, outputs, inputs, dtype, expected):
    called = spy(monkeypatch, "gemv_triton", "skinny_gemm_triton")
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    linear(torch.zeros(rows, inputs, dtype=dtype), torch.zeros(outputs, inputs, dtype=dtype))
    assert called == expected


@pytest.mark.parametrize(
    ("rows", "dtype", "expected"),
    [
        (1, torch.bfloat16, ["linear"]),
        (2, torch.bfloat16, ["skinny_gemm_triton"]),
        (64, torch.bfloat16, ["skinny_gemm_triton"]),
        (65, torch.bfloat16, ["linear"]),
        (2, torch.float32, ["linear"]),
    ],
)
def test_before_a_norm_a_few_rows_are_not_added_up(monkeypatch, rows, dtype, expected):
    called = spy(monkeypatch, "linear")
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)

    def kernel(*_, parts=False, **__):
        called.append("skinny_gemm_triton" if parts else "added up")

    monkeypatch.setattr(dispatch, "skinny_gemm_triton", kernel)
    split_linear(torch.zeros(rows, 16, dtype=dtype), torch.zeros(16, 16, dtype=dtype))
    assert called == expected


def test_one_row_after_a_norm_is_one_kernel(monkeypatch):
    called = spy(monkeypatch, "norm_gemv_triton", "linear")
    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    for rows in (1, 2):
        norm_linear(torch.zeros(rows, 8), None, torch.zeros(8), 1e-6, torch.zeros(4, 8))
    assert called == ["norm_gemv_triton", "linear"]


@pytest.mark.parametrize("busy", [False, True])
def test_an_activated_layer_takes_the_kernel_where_it_fills_the_gpu(device, monkeypatch, busy):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    launched = []

    def kernel(x, *arguments):
        launched.append(x.shape)
        return gemm_activation_triton(x, *arguments)

    monkeypatch.setattr(dispatch, "use_triton", lambda _: True)
    monkeypatch.setattr(gemm_activation, "supports", lambda *_: True)
    monkeypatch.setattr(gemm_activation, "fills_gpu", lambda *_: busy)
    monkeypatch.setattr(dispatch, "gemm_activation_triton", kernel)
    x, weight, bias = problem(device, dtype, 10, 16, 8, beyond=8)
    x = x.contiguous().unflatten(0, (2, 5))
    result = activated_linear(x, weight, bias, "gelu")
    assert launched == ([(10, 8)] if busy else [])
    assert_close(result, gemm_activation_reference(*double(x, weight, bias), "gelu"))


def test_many_rows_are_left_to_torch(device, dtype):
    x, weight, bias = problem(device, dtype, 65, 12, 16)
    torch.testing.assert_close(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    norm, residual = torch.rand(16).to(device, dtype), x.clone()
    out, total = norm_linear(x, residual, norm, 1e-3, weight, bias, activation="silu")
    expected, summed = norm_linear_reference(x, residual, norm, 1e-3, weight, bias, activation="silu")
    assert_close(out, expected)
    assert torch.equal(total, summed)
    out, total = norm_linear(x, residual, None, 0.0, weight, bias)
    assert_close(out, torch.nn.functional.linear(summed, weight, bias))
    assert torch.equal(total, summed)


def test_no_rows(device):
    x, weight, bias = problem(device, torch.float32, 0, 12, 16)
    assert linear(x, weight, bias).shape == (0, 12)
    out, total = norm_linear(x, x, torch.ones(16, device=device), 1e-3, weight, activation="silu")
    assert out.shape == (0, 6) and total.shape == (0, 16)


def test_the_table_names_every_file_and_every_kernel_that_dispatch_calls():
    assert kernels.__doc__ is not None
    named = set(re.findall(r"\b(\w+)\.py\b", kernels.__doc__))
    assert named == {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    called = set(re.findall(r"\b(\w+_(?:triton|gluon|reference))\b", (FOLDER / "dispatch.py").read_text()))
    listed = set(re.findall(r"\b(\w+_(?:triton|gluon|reference))\b", kernels.__doc__))
    assert called - {"use_triton"} == listed - {"use_triton"}


def test_the_table_names_the_file_of_each_kernel():
    assert kernels.__doc__ is not None
    rows = re.findall(r" (\w+_(?:triton|gluon|reference))  .*  (\w+\.py)$", kernels.__doc__, re.MULTILINE)
    assert len(rows) == 38
    for kernel, file in rows:
        assert f"def {kernel}(" in (FOLDER / file).read_text(), kernel
