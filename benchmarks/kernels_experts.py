"""Mixtures of experts: the router, the sorting of tokens by expert, and the experts' MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels_timing import Case, Problem, dtype_on
from engine.kernels.device import use_triton
from engine.kernels.dispatch import MIN_EXPERT_GEMM_ROWS, experts
from engine.kernels.expert_groups import group_by_expert_reference, group_by_expert_triton
from engine.kernels.experts import ExpertMatrices, experts_reference
from engine.kernels.fp8 import FP8, Scale
from engine.kernels.int4 import Int4Scale, pack
from engine.kernels.norm_router import norm_router, norm_router_apart
from engine.kernels.route import Routing, route_reference
from engine.kernels.router_config import RouterConfig
from engine.kernels.router_logits import router_logits, router_logits_reference

#: Experts, experts of a token, hidden and inner width: those of Qwen3-VL-30B-A3B.
SIZES, TINY_SIZES = (128, 8, 2048, 768), (6, 2, 24, 10)
TOKENS, TINY_TOKENS = (64, 1024, 8192), (5, 60)


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    sizes = TINY_SIZES if tiny else SIZES
    label = f"{sizes[1]} of {sizes[0]}, {sizes[2]}x{sizes[3]}"
    yield Case("expert_gemv", f"{label}, 1 token", partial(mlps, device, 1, *sizes))
    yield Case("int4_experts", f"{label}, 1 token", partial(mlps, device, 1, *sizes, stored="int4"))
    for tokens in (1, 2) if tiny else (1, 8):
        yield Case(
            "norm_router", f"{label}, {tokens} tokens", partial(norm_and_logits, device, tokens, *sizes)
        )
    for tokens in TINY_TOKENS if tiny else TOKENS:
        yield Case("route", f"{label}, {tokens} tokens", partial(router, device, tokens, *sizes))
        yield Case("router_logits", f"{label}, {tokens} tokens", partial(logits, device, tokens, *sizes))
        yield Case("expert_groups", f"{label}, {tokens} tokens", partial(groups, device, tokens, *sizes))
        kernel = "expert_gemm" if tokens * sizes[1] > MIN_EXPERT_GEMM_ROWS * sizes[0] else "grouped_gemm"
        yield Case(kernel, f"{label}, {tokens} tokens", partial(mlps, device, tokens, *sizes))
        for kernel, stored in (("expert_gemm", "fp8"), ("int4_experts", "int4")):
            work = partial(mlps, device, tokens, *sizes, stored=stored)
            yield Case(kernel, f"{label}, {stored}, {tokens} tokens", work)


def _routing(device: torch.device, tokens: int, count: int, top_k: int) -> Routing:
    return Routing(torch.randn((tokens, count), device=device), RouterConfig(count, top_k))


def norm_and_logits(device: torch.device, tokens: int, count: int, _: int, hidden: int, *__: int) -> Problem:
    """Measure the norm before a mixture of experts with the router's logits, beside both apart."""
    x, residual = torch.randn((2, tokens, hidden), device=device, dtype=dtype_on(device)).unbind(0)
    norm, weight = torch.rand_like(x[0]) + 0.5, torch.randn((count, hidden), device=device) * hidden**-0.5
    arguments = x, residual, norm, 1e-6, weight
    run, apart = partial(norm_router, *arguments), partial(norm_router_apart, *arguments, 0.0)
    return Problem(run, lambda: (run()[2], apart()[2]), weight.nbytes + 4 * x.nbytes, peers={"apart": apart})


def logits(device: torch.device, tokens: int, count: int, _: int, hidden: int, *__: int) -> Problem:
    """Measure the logits of a router, beside torch's GEMM in float32."""
    x = torch.randn((tokens, hidden), device=device, dtype=dtype_on(device))
    weight = torch.randn((count, hidden), device=device) * hidden**-0.5
    run, apart = partial(router_logits, x, weight), partial(router_logits_reference, x, weight)
    moved = x.nbytes + weight.nbytes + tokens * count * 4
    return Problem(run, lambda: (run(), apart()), moved, peers={"torch": apart})


def router(device: torch.device, tokens: int, count: int, top_k: int, *_: int) -> Problem:
    """Measure the choice of experts; the sums of the weights by expert are compared."""
    routing = _routing(device, tokens, count, top_k)
    logits = routing.logits

    def spread(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.zeros_like(logits).scatter_(1, found[0].long(), found[1])

    moved = logits.nbytes + tokens * top_k * 8
    return Problem(
        routing.chosen, lambda: (spread(routing.chosen()), spread(route_reference(routing))), moved
    )


def groups(device: torch.device, tokens: int, count: int, top_k: int, *_: int) -> Problem:
    """Measure the sorting of pairs of a token and an expert."""
    ids = _routing(device, tokens, count, top_k).chosen()[0]
    run = partial(group_by_expert_triton if use_triton(ids) else group_by_expert_reference, ids, count)
    peers = {"torch": partial(group_by_expert_reference, ids, count)}
    moved = 2 * ids.nbytes + (count + 1) * 4
    return Problem(run, lambda: (run()[0], group_by_expert_reference(ids, count)[0]), moved, peers=peers)


def _matrices(device: torch.device, count: int, outputs: int, inputs: int, stored: str) -> ExpertMatrices:
    """Random matrices of experts in the dtype of their input; in fp8, made for fp8 inputs, with a scale for
    each output; or in int4 in groups of 128 with zero points."""
    shape = count, outputs, inputs
    if stored == "fp8":
        values = torch.full((count * outputs, 1), inputs**-0.5 / 30, device=device)
        weight = (torch.randn(shape, device=device) * 30).to(FP8)
        return ExpertMatrices(weight, Scale(values, inputs, round_inputs=True))
    if stored != "int4":
        return ExpertMatrices(torch.randn(shape, device=device, dtype=dtype_on(device)) * inputs**-0.5)
    rows, groups = count * outputs, -(-inputs // 128)
    words = pack(torch.randint(0, 16, (rows, inputs), device=device, dtype=torch.uint8))
    values = ((torch.rand((rows, groups), device=device) + 0.5) * inputs**-0.5 / 8).half()
    zeros = torch.randint(0, 16, values.shape, device=device, dtype=torch.uint8)
    return ExpertMatrices(words.unflatten(0, (count, outputs)), Int4Scale(inputs, values, 128, zeros))


def mlps(
    device: torch.device,
    tokens: int,
    count: int,
    top_k: int,
    hidden: int,
    inner: int,
    *,
    stored: str = "16-bit",
) -> Problem:
    """Measure the MLPs of the tokens' experts, beside torch's, one expert after the other.

    Args:
        stored: the weights' format: 16-bit, fp8 or int4.
    """
    x = torch.randn((tokens, hidden), device=device, dtype=dtype_on(device))
    gate_up = _matrices(device, count, 2 * inner, hidden, stored)
    down = _matrices(device, count, hidden, inner, stored)
    routing = _routing(device, tokens, count, top_k)
    run = partial(experts, x, routing, gate_up, down, "silu")
    apart = partial(experts_reference, x, *routing.chosen(), gate_up, down, "silu")
    if tokens > 1:
        amount = 6 * tokens * top_k * hidden * inner
        return Problem(run, lambda: (run(), apart()), amount, compute=True, peers={"torch": apart})
    used = top_k * sum(_bytes(matrices) for matrices in (gate_up, down)) // count
    return Problem(run, lambda: (run(), apart()), used, peers={"torch": apart})


def _bytes(matrices: ExpertMatrices) -> int:
    """Bytes of the matrices of all experts."""
    scale = matrices.scale
    if scale is None:
        return matrices.weight.nbytes
    zeros = scale.zeros if isinstance(scale, Int4Scale) else None
    return matrices.weight.nbytes + scale.values.nbytes + (0 if zeros is None else zeros.nbytes)
