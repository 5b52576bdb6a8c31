"""The router of a mixture of experts: from logits to each token's experts and their weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.router_config import RouterConfig


def route(
    logits: torch.Tensor, config: RouterConfig, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token; see :class:`~engine.kernels.router_config.RouterConfig`.

    Args:
        logits: ``(T, E)`` float32 contiguous.
        bias: ``(E,)`` float32, the correction bias if ``config`` has one.

    Returns:
        Ids ``(T, top_k)`` int32, all below ``E`` even if logits are NaN, and weights ``(T, top_k)`` float32.
        The order within a token's experts is not defined.
    """
    assert (bias is not None) == config.correction_bias
    run = route_triton if use_triton(logits) else route_reference
    return run(logits, config, bias)


def route_reference(logits, config, bias=None):
    """Compute :func:`route` in torch. Ties are broken as torch.topk breaks them, as in Transformers."""
    scores = logits.sigmoid() if config.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if config.top_groups < config.num_groups:
        grouped = choice.unflatten(-1, (config.num_groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(config.top_groups, dim=-1).indices, 1).bool()
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    ids = choice.topk(config.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if config.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights * config.scaling


def route_triton(logits, config, bias=None):
    tokens, experts = logits.shape
    assert logits.is_contiguous() and experts == config.num_experts <= 1 << 16
    ids = torch.empty((tokens, config.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, config.top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        launch(
            _route_kernel, (tokens,),
            logits_ptr=logits, bias_ptr=logits if bias is None else bias, ids_ptr=ids, weights_ptr=weights,
            scaling=config.scaling, GROUPS=config.num_groups, GROUP_SIZE=experts // config.num_groups,
            TOP_GROUPS=config.top_groups, TOP_K=config.top_k, SIGMOID=config.scoring == "sigmoid",
            BIAS=bias is not None, RENORMALISE=config.renormalise, num_warps=1, **pdl_options(logits),
        )  # fmt: skip
    return ids, weights


@triton.jit
def _first_of_largest(values, index, NONE: tl.constexpr):
    """Return the least ``index`` among the largest ``values``, of tensors of one or two dimensions."""
    largest = tl.max(values)
    return tl.min(tl.where(values == largest, index, NONE))


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, scaling,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, RENORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token; the experts are a tile of groups by members."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, triton.next_power_of_2(GROUPS))[:, None]
    member = tl.arange(0, triton.next_power_of_2(GROUP_SIZE))[None, :]
    known = (group < GROUPS) & (member < GROUP_SIZE)
    expert = group * GROUP_SIZE + member
    EXPERTS: tl.constexpr = GROUPS * GROUP_SIZE
    logits = tl.load(logits_ptr + token * EXPERTS + expert, mask=known, other=float("-inf"))
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        largest = tl.max(logits)
        scores = tl.exp(logits - largest)
        total = tl.sum(scores)
        scores = scores / total
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + expert, mask=known, other=0.0)
    choice = tl.where(known, choice, float("-inf"))
    if TOP_GROUPS < GROUPS:
        first = tl.max(choice, axis=1)[:, None]
        place = tl.min(tl.where(choice == first, member, GROUP_SIZE), axis=1)[:, None]
        best = first
        if GROUP_SIZE > 1:
            best += tl.max(tl.where(member == place, float("-inf"), choice), axis=1)[:, None]
        kept = group < 0
        for _ in tl.static_range(TOP_GROUPS):
            chosen = group == _first_of_largest(best, group, GROUPS)
            kept = kept | chosen
            best = tl.where(chosen, float("-inf"), best)
        choice = tl.where(kept, choice, float("-inf"))
    # A key orders experts by their choice, then by their index, so a single reduction finds the next one. Floats
    # order like their bits, of which negative ones are turned round; NaN comes first or last. Padding has the
    # least key, and an expert that was taken a lesser one.
    bits = choice.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(known, (ordered << 16) + (EXPERTS - 1 - expert), -(1 << 62))
    lane = tl.arange(0, triton.next_power_of_2(TOP_K))
    keys = tl.zeros(lane.shape, tl.int64)
    for k in tl.static_range(TOP_K):
        best_key = tl.max(key)
        keys = tl.where(lane == k, best_key, keys)
        key = tl.where(key == best_key, -(1 << 63), key)
    mask = lane < TOP_K
    ids = (EXPERTS - 1 - (keys & 0xFFFF)).to(tl.int32)
    # Their scores once more, by the same operations.
    weights = tl.load(logits_ptr + token * EXPERTS + ids, mask=mask, other=float("-inf"))
    if SIGMOID:
        weights = tl.sigmoid(weights)
    else:
        weights = tl.exp(weights - largest) / total
    if RENORMALISE:
        weights = weights / tl.sum(weights)
    tl.store(ids_ptr + token * TOP_K + lane, ids, mask=mask)
    tl.store(weights_ptr + token * TOP_K + lane, weights * scaling, mask=mask)
