"""The kernels of a mixture of experts equal their torch references, and those equal plain definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import dispatch, expert_gemm, expert_gemv
from engine.kernels.expert_gemm import grouped_experts_gluon
from engine.kernels.expert_gemv import ExpertTile, expert_gemv_triton
from engine.kernels.expert_groups import group_by_expert_reference, group_by_expert_triton
from engine.kernels.experts import ExpertMatrices, experts_reference
from engine.kernels.fp8 import FP8, Scale, quantise_rows_reference
from engine.kernels.grouped_gemm import choose_height, grouped_experts_triton
from engine.kernels.int4 import Int4Scale, pack
from engine.kernels.int4_experts import int4_expert_gemv_triton, int4_grouped_gemm_triton
from engine.kernels.norm_router import norm_router_apart, norm_router_triton
from engine.kernels.route import Routing, route_reference, route_triton
from engine.kernels.router_config import RouterConfig
from engine.kernels.router_logits import router_logits_reference, router_logits_triton

from .compare import assert_close

ROUTERS = {
    "softmax": RouterConfig(6, 3, renormalise=False),
    "renormalised": RouterConfig(128, 8),
    "one": RouterConfig(1, 1),
    "all": RouterConfig(5, 5, scaling=2.5),
    "sigmoid": RouterConfig(24, 4, "sigmoid", correction_bias=True, scaling=1.5),
    "groups": RouterConfig(24, 4, "sigmoid", correction_bias=True, num_groups=6, top_groups=2),
    "groups of one": RouterConfig(7, 2, "sigmoid", num_groups=7, top_groups=3),
    "groups of softmax": RouterConfig(64, 6, renormalise=False, num_groups=8, top_groups=3),
}


def by_id(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort each token's experts: their order is not defined."""
    order = ids.argsort(dim=-1)
    return ids.gather(1, order), weights.gather(1, order)


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_a_router(device, config):
    logits = (torch.randn(7, config.num_experts) * 3).to(device)
    bias = torch.randn(config.num_experts).to(device) if config.correction_bias else None
    routing = Routing(logits, config, bias)
    ids, weights = by_id(*route_triton(routing))
    expected_ids, expected = by_id(*route_reference(routing))
    assert ids.dtype == torch.int32 and torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("offset", [None, 1.0])
@pytest.mark.parametrize(("tokens", "experts", "size"), [(1, 5, 24), (3, 8, 33)])
def test_a_norm_with_a_router(device, dtype, tokens, experts, size, offset):
    x = torch.full((tokens, size + 8), torch.nan)[:, :size].to(device, dtype)
    x.copy_(torch.randn(tokens, size))
    norm, weight = torch.rand(size).to(device, dtype), torch.randn(experts, size).to(device)
    for residual in (None, torch.randn(tokens, size).to(device, dtype)):
        arguments = x, residual, norm, 1e-5, weight, offset
        for result, expected in zip(
            norm_router_triton(*arguments), norm_router_apart(*arguments), strict=True
        ):
            assert result.dtype == expected.dtype
            # Of 16 bits the norms may differ in the last one, and the logits with them.
            assert_close(result, expected, tolerance=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("tokens", "experts", "size"), [(1, 5, 40), (40, 70, 192), (2100, 130, 64), (90, 30, 2048)]
)
def test_logits_of_a_router_have_the_precision_of_float32(device, dtype, tokens, experts, size):
    """Products with one part of each weight would be off by 1e-3, with two by 1e-5."""
    x = torch.full((tokens, size + 8), torch.nan)[:, :size].to(device, dtype)
    x.copy_(torch.randn(tokens, size))
    weight = torch.randn(experts, size).to(device)
    exact = x.double() @ weight.double().T
    for run in (router_logits_triton, router_logits_reference):
        result = run(x, weight)
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert (result - exact).norm() / exact.norm() < 1e-6


def test_equal_logits_and_nan_give_experts_that_exist(device):
    config = RouterConfig(6, 3)
    logits = torch.zeros(3, 6, device=device)
    logits[1] = torch.nan
    logits[2, 4] = torch.inf
    ids, weights = route_triton(Routing(logits, config))
    assert ids[0].tolist() == [0, 1, 2] and weights[0].cpu().allclose(torch.full((3,), 1 / 3))
    assert ((ids >= 0) & (ids < 6)).all()


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (7, 3, 5), (700, 2, 6), (40_000, 2, 6)])
def test_pairs_are_sorted_by_expert(device, tokens, top_k, experts):
    # Some experts have no pair: the first, the last and one between.
    ids = torch.randint(experts, (tokens, top_k), dtype=torch.int32).to(device)
    ids[ids == 0], ids[ids == experts // 2] = experts // 3, experts // 3
    order, starts = group_by_expert_triton(ids, experts)
    expected_order, expected_starts = group_by_expert_reference(ids, experts)
    assert torch.equal(order, expected_order) and torch.equal(starts, expected_starts)
    assert starts[-1] == tokens * top_k


def problem(device, dtype, tokens, top_k, experts, width, inner, group=None, *, routed=False):
    """Arguments of :func:`~engine.kernels.dispatch.chosen_experts`, and its result in float64.

    Args:
        routed: make them those of :func:`~engine.kernels.dispatch.experts`.
    """
    x = torch.full((tokens, width + 8), torch.nan)[:, :width].to(device, dtype)
    x.copy_(torch.randn(tokens, width))
    config = RouterConfig(experts, top_k, renormalise=tokens % 2 == 0, scaling=1.5)
    routing = Routing((torch.randn(tokens, experts) * 2).to(device), config)
    ids, weights = route_reference(routing)
    gate_up, down = (
        matrices(device, dtype, shape, group)
        for shape in ((experts, 2 * inner, width), (experts, width, inner))
    )
    exact = torch.zeros(tokens, width, dtype=torch.float64, device=device)
    for token in range(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            row = x[token].double()
            gate, up = (gate_up.one(expert, torch.float64).double() @ row).chunk(2)
            exact[token] += weight * (down.one(expert, torch.float64).double() @ (F.silu(gate) * up))
    chosen = (routing,) if routed else (ids, weights)
    return (x, *chosen, gate_up, down, "silu"), exact


#: Weights in floats of 4 bits.
FLOATS = ["mxfp4", "nvfp4"]


def packed_floats(outputs, inputs, kind):
    """Return words and scales of a matrix whose numbers are about ``inputs ** -0.5``."""
    group = 32 if kind == "mxfp4" else 16
    words = pack(torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8))
    shape = outputs, -(-inputs // group)
    if kind == "mxfp4":
        return words, Int4Scale(inputs, torch.randint(121, 125, shape).to(torch.uint8), group, kind=kind)
    values = torch.randint(30, 60, shape).to(torch.uint8)
    return words, Int4Scale(inputs, values, group, kind=kind, factors=(torch.rand(outputs) + 0.5) / 8)


def moved(scale, device):
    factors = None if scale.factors is None else scale.factors.to(device)
    return replace(scale, values=scale.values.to(device), factors=factors)


def matrices(device, dtype, shape, group) -> ExpertMatrices:
    experts, outputs, inputs = shape
    if group in FLOATS:
        words, scale = packed_floats(experts * outputs, inputs, group)
        return ExpertMatrices(words.unflatten(0, (experts, -1)).to(device), moved(scale, device))
    if isinstance(group, str):
        size = int(group)
        groups = -(-inputs // size)
        words = pack(torch.randint(0, 16, (experts * outputs, inputs), dtype=torch.uint8)).unflatten(
            0, (experts, -1)
        )
        values = (torch.rand(experts * outputs, groups) * 3 + 0.2) * inputs**-0.5 / 8
        zeros = torch.randint(0, 16, values.shape, dtype=torch.uint8).to(device) if group == "128" else None
        return ExpertMatrices(words.to(device), Int4Scale(inputs, values.to(device), size, zeros))
    if group is None:
        return ExpertMatrices((torch.randn(shape) * inputs**-0.5).to(device, dtype))
    values = (torch.rand(experts * outputs, -(-inputs // group)) * 3 + 0.2) * inputs**-0.5 / 30
    return ExpertMatrices((torch.randn(shape) * 30).to(FP8).to(device), Scale(values.to(device), group))


#: Groups of int4 weights: several without zero points, and one with; and kinds of floats.
INT4 = ["16", "128", *FLOATS]


@pytest.mark.covering(1)
@pytest.mark.parametrize("group", [None, 1 << 15, 16, *INT4])
# Tokens, experts of a token, experts, width, inner width.
@pytest.mark.parametrize("size", [(1, 2, 5, 20, 12), (2, 1, 1, 24, 8), (2, 3, 4, 9, 11)], ids=str)
def test_few_tokens(device, dtype, size, group):
    arguments, exact = problem(device, dtype, *size, group, routed=group not in INT4)
    run = int4_expert_gemv_triton if group in INT4 else expert_gemv_triton
    assert_close(run(*arguments), exact, tolerance=1e-5 if group in INT4 else 0.0)


@pytest.mark.covering(2)
@pytest.mark.parametrize("run", [grouped_experts_triton, experts_reference])
@pytest.mark.parametrize("group", [None, 1 << 15, 32, *INT4])
@pytest.mark.parametrize("size", [(9, 3, 7, 70, 33), (20, 2, 3, 64, 64), (2, 4, 9, 32, 16)], ids=str)
def test_many_tokens(device, dtype, size, group, run):
    arguments, exact = problem(device, dtype, *size, group)
    if group in INT4 and run is grouped_experts_triton:
        run = int4_grouped_gemm_triton
    assert_close(run(*arguments), exact, tolerance=1e-5 if group in INT4 else 0.0)


@pytest.mark.parametrize(("inputs", "ready", "share"), [(4, 0, 1), (16, 0, 1), (16, 2, 3)])
def test_one_row_of_several_steps(device, dtype, monkeypatch, inputs, ready, share):
    """So many that they are a loop, and few, which are loaded at once; several outputs of a program."""
    tile = ExpertTile(2, inputs, warps=4, ready=ready, share=share)
    monkeypatch.setattr(expert_gemv, "choose_tile", lambda *_, **__: tile)
    arguments, exact = problem(device, dtype, 1, 2, 3, 40, 20, routed=True)
    assert_close(expert_gemv_triton(*arguments), exact)


@pytest.mark.parametrize(("pairs", "rows"), [(32, 16), (34, 64), (260, 128)])
def test_every_height_of_tiles(device, dtype, pairs, rows):
    assert choose_height(pairs, 2) == rows
    arguments, exact = problem(device, dtype, pairs // 2, 2, 2, 32, 40)
    assert_close(grouped_experts_triton(*arguments), exact)


#: Outputs and inputs of a block with one scale.
BLOCK = 128


def blocks(device, shape) -> ExpertMatrices:
    """fp8 weights with scales of blocks that differ by a factor of up to 16."""
    experts, outputs, inputs = shape
    values = (torch.rand(experts, -(-outputs // BLOCK), inputs // BLOCK) * 3 + 0.2) * inputs**-0.5 / 30
    values = values.repeat_interleave(BLOCK, dim=1)[:, :outputs].flatten(0, 1).contiguous()
    scale = Scale(values.to(device), BLOCK, round_inputs=True, outputs=BLOCK)
    return ExpertMatrices((torch.randn(shape) * 30).to(FP8).to(device), scale)


def grouped(device, dtype, counts, width, inner, stored="16-bit"):
    """Arguments of experts that have ``counts`` pairs, one for each token, and their result in float64.

    Args:
        stored: "16-bit"; "rows" or "blocks": in fp8 with a scale for each output or block, for rows that
            are rounded to fp8 too, by groups of inputs for blocks.
    """
    tokens = sum(counts)
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = expert[torch.randperm(tokens)].int()[:, None].to(device)
    # Magnitudes differ between groups of inputs.
    x = torch.randn(tokens, width) * (torch.rand(tokens, width // 64) + 0.1).repeat_interleave(64, dim=1)
    x, weights = x.to(device, dtype), torch.rand(tokens, 1).to(device)
    shapes = (len(counts), 2 * inner, width), (len(counts), width, inner)
    if stored == "blocks":
        gate_up, down = (blocks(device, shape) for shape in shapes)
    else:
        group = 1 << 15 if stored == "rows" else None
        gate_up, down = (matrices(device, dtype, shape, group) for shape in shapes)
    if stored == "rows":
        gate_up, down = (
            replace(part, scale=replace(part.scale, round_inputs=True)) for part in (gate_up, down)
        )

    def seen(rows):
        if stored == "16-bit":
            return rows.double()
        group = BLOCK if stored == "blocks" else None
        numbers, scale = quantise_rows_reference(rows, group)
        return numbers.double() * scale.repeat_interleave(group or rows.shape[1], dim=1)

    exact = torch.zeros(tokens, width, dtype=torch.float64, device=device)
    for index in range(len(counts)):
        own = ids[:, 0] == index
        gate, up = (seen(x[own]) @ gate_up.one(index, torch.float64).double().T).chunk(2, 1)
        result = seen((F.silu(gate) * up).to(dtype)) @ down.one(index, torch.float64).double().T
        exact[own] = weights[own].double() * result
    return (x, ids, weights, gate_up, down, "silu"), exact


#: Pairs of each expert, and widths: ends of tiles of 64 and 128 rows, experts without rows, more tiles than
#: programs; whole tiles of outputs, and parts of them. With few of an expert the compute groups take turns.
GROUPS = {
    "ends": ([1, 0, 63, 64, 65, 127, 128, 129, 0, 300, 7], 256, 256),
    "none at the ends": ([0, 0, 40, 0], 384, 384),
    "many": ([97 * (index % 5) for index in range(60)], 512, 768),
    "few": ([*(index % 6 for index in range(127)), 200], 768, 512),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bfloat16, "16-bit"),
        (torch.float16, "16-bit"),
        (torch.bfloat16, "rows"),
        (torch.bfloat16, "blocks"),
    ],
)
@pytest.mark.parametrize("case", GROUPS)
def test_the_kernel_for_hopper_gpus(hopper, dtype, stored, case):
    arguments, exact = grouped(hopper, dtype, *GROUPS[case], stored)
    assert expert_gemm.supports(arguments[0], arguments[3]) and expert_gemm.supports(
        arguments[0], arguments[4]
    )
    result = grouped_experts_gluon(*arguments)
    assert_close(result, exact)
    for _ in range(50):
        # Warps work in parallel: a read of a tile that is not loaded yet would show now and then.
        assert torch.equal(grouped_experts_gluon(*arguments), result)


def test_only_hopper_whole_steps_and_plain_16_bit_weights_are_supported(monkeypatch):
    x, weight = torch.zeros(4, 128, dtype=torch.bfloat16), torch.zeros(2, 16, 128, dtype=torch.bfloat16)
    assert not expert_gemm.supports(x, ExpertMatrices(weight))
    monkeypatch.setattr(expert_gemm, "is_hopper", lambda _: True)
    assert expert_gemm.supports(x, ExpertMatrices(weight))
    wide = torch.zeros(4, 256, dtype=torch.bfloat16)
    rounded = torch.zeros(2, 16, 256).to(FP8)
    assert expert_gemm.supports(wide, ExpertMatrices(rounded, Scale(torch.ones(32, 1), 1 << 15, True)))
    assert expert_gemm.supports(wide, ExpertMatrices(rounded, Scale(torch.ones(32, 2), 128, True, 128)))
    for scale in (
        Scale(torch.ones(32, 1), 1 << 15),
        Scale(torch.ones(32, 2), 128, True),
        Scale(torch.ones(32, 2), 128, False, 128),
        Scale(torch.ones(32, 4), 64, True, 128),
    ):
        assert not expert_gemm.supports(wide, ExpertMatrices(rounded, scale))
    others = [ExpertMatrices(other) for other in (weight.half(), weight[..., :64], weight[..., :96])]
    assert not any(expert_gemm.supports(x, matrices) for matrices in others)
    assert not expert_gemm.supports(x.float(), ExpertMatrices(weight.float()))
    shifted = torch.zeros(4, 136, dtype=torch.bfloat16)[:, 1:129]
    assert not expert_gemm.supports(shifted, ExpertMatrices(weight))


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "relu"])
def test_other_activations(device, dtype, activation):
    (x, routing, *stored, _), _ = problem(device, dtype, 1, 2, 3, 24, 8, routed=True)
    chosen = x, *routing.chosen(), *stored, activation
    expected = experts_reference(*chosen)
    for result in (expert_gemv_triton(x, routing, *stored, activation), grouped_experts_triton(*chosen)):
        assert_close(result, expected, tolerance=1e-5)


@pytest.mark.parametrize(
    ("tokens", "top_k", "count", "triton", "fp8", "reads", "hopper", "expected"),
    [
        (1, 8, 128, True, False, True, True, "expert_gemv_triton"),
        (1, 2, 2, True, False, True, False, "expert_gemv_triton"),
        (4, 8, 128, True, True, True, False, "expert_gemv_triton"),
        (5, 8, 128, True, False, True, False, "grouped_experts_triton"),
        (9, 2, 128, True, False, True, True, "grouped_experts_triton"),
        (3, 2, 8, True, False, True, False, "grouped_experts_triton"),
        (32, 2, 8, True, False, True, True, "grouped_experts_triton"),
        (33, 2, 8, True, False, True, True, "grouped_experts_gluon"),
        (9, 2, 8, True, True, True, True, "grouped_experts_gluon"),
        (33, 2, 8, True, False, True, False, "grouped_experts_triton"),
        (2, 2, 8, True, False, True, False, "expert_gemv_triton"),
        (0, 2, 8, True, False, True, True, "experts_reference"),
        (1, 2, 8, True, True, False, False, "experts_reference"),
        (9, 2, 8, False, False, True, False, "experts_reference"),
    ],
)
def test_the_choice_among_kernels(monkeypatch, tokens, top_k, count, triton, fp8, reads, hopper, expected):
    called = []
    monkeypatch.setattr(expert_gemm, "supports", lambda *_: hopper)
    names = "expert_gemv_triton", "grouped_experts_triton", "grouped_experts_gluon", "experts_reference"
    for name in names:
        monkeypatch.setattr(dispatch, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(dispatch, "use_triton", lambda _: triton)
    monkeypatch.setattr(dispatch, "reads_fp8", lambda _: reads)
    weight = torch.zeros(count, 32, 16)
    stored = ExpertMatrices(weight)
    if fp8:
        stored = ExpertMatrices(weight.to(FP8), Scale(torch.ones(count * 32, 1), 16))
    routing = Routing(torch.zeros(tokens, count), RouterConfig(count, top_k))
    dispatch.experts(torch.zeros(tokens, 16), routing, stored, stored, "silu")
    assert called == [expected]
