"""The router of a mixture of experts: from logits to each token's experts and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.router_config import RouterConfig


@dataclass(frozen=True, slots=True)
class Routing:
    """The logits of a router, which choose the experts of each token.

    Attributes:
        logits: ``(T, E)`` float32 contiguous.
        bias: ``(E,)`` float32, the correction bias if ``config`` has one.
        factors: ``(E,)`` float32, by which the weights of each expert are multiplied in the end; None: by 1.
    """

    logits: torch.Tensor
    config: RouterConfig
    bias: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.logits.is_contiguous() and self.logits.shape[1] == self.config.num_experts
        assert (self.bias is not None) == self.config.correction_bias

    def chosen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts of each token; see :class:`~engine.kernels.router_config.RouterConfig`.

        Returns:
            Ids ``(T, top_k)`` int32, all below ``E`` even if logits are NaN, and weights ``(T, top_k)``
            float32. The order within a token's experts is not defined.
        """
        ids, weights = (route_triton if use_triton(self.logits) else route_reference)(self)
        return ids, weights if self.factors is None else weights * self.factors[ids.long()]

    def arguments(self) -> dict[str, Any]:
        """Arguments of a kernel for :func:`choose_experts`, which leaves out ``factors``."""
        config = self.config
        return {
            "logits_ptr": self.logits, "bias_ptr": self.logits if self.bias is None else self.bias,
            "scaling": config.scaling, "GROUPS": config.num_groups,
            "GROUP_SIZE": config.num_experts // config.num_groups, "TOP_GROUPS": config.top_groups,
            "TOP_K": config.top_k, "SIGMOID": config.scoring == "sigmoid", "BIAS": self.bias is not None,
            "RENORMALISE": config.renormalise,
        }  # fmt: skip


def route_reference(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :meth:`Routing.chosen` in torch. Ties are broken as torch.topk breaks them, as in Transformers."""
    logits, config, bias = routing.logits, routing.config, routing.bias
    scores = logits.sigmoid() if config.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if config.scoring == "sigmoid" and bias is None and config.top_groups == config.num_groups:
        # Sigmoids of large logits are equal.
        choice = logits
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


def route_triton(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    logits, top_k = routing.logits, routing.config.top_k
    ids = torch.empty((len(logits), top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((len(logits), top_k), dtype=torch.float32, device=logits.device)
    if len(logits):
        launch(
            _route_kernel, (len(logits),), ids_ptr=ids, weights_ptr=weights, **routing.arguments(), num_warps=1,
            **pdl_options(logits),
        )  # fmt: skip
    return ids, weights


@triton.jit
def _first_of_largest(values, index, NONE: tl.constexpr):
    """Return the least ``index`` among the largest ``values``, of tensors of one or two dimensions."""
    largest = tl.max(values)
    return tl.min(tl.where(values == largest, index, NONE))


@triton.jit
def _best_groups(
    choice, group, member, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr
):  # fmt: skip
    """Return whether a group is kept: one of those with the largest sums of their two best experts."""
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
    return kept


@triton.jit
def _order(
    logits_ptr, bias_ptr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Load the logits of a token and find in which order its experts are chosen.

    Returns:
        Whole numbers that order the experts, the largest first; the experts' numbers, of which padding has one beyond
        all; the largest logit, and the sum of the exponentials of what logits are less, unless SIGMOID.
    """
    group = tl.arange(0, triton.next_power_of_2(GROUPS))[:, None]
    member = tl.arange(0, triton.next_power_of_2(GROUP_SIZE))[None, :]
    known = (group < GROUPS) & (member < GROUP_SIZE)
    expert = group * GROUP_SIZE + member
    EXPERTS: tl.constexpr = GROUPS * GROUP_SIZE
    logits = tl.load(logits_ptr + expert, mask=known, other=float("-inf"))
    # Scores grow with logits: without a bias and groups, the logits choose.
    choice = logits
    largest = tl.max(logits)
    exponentials = tl.exp(logits - largest)
    total = tl.sum(exponentials)
    if BIAS or TOP_GROUPS < GROUPS:
        if SIGMOID:
            choice = tl.sigmoid(logits)
        else:
            choice = exponentials / total
        if BIAS:
            choice += tl.load(bias_ptr + expert, mask=known, other=0.0)
        choice = tl.where(known, choice, float("-inf"))
        if TOP_GROUPS < GROUPS:
            kept = _best_groups(choice, group, member, GROUPS, GROUP_SIZE, TOP_GROUPS)
            choice = tl.where(kept, choice, float("-inf"))
    # Floats order like their bits, of which negative ones are turned round; NaN comes first or last. A warp
    # reduces whole numbers of 32 bits by one instruction.
    bits = choice.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return key, tl.where(known, expert, EXPERTS), largest, total


@triton.jit
def _take_first(key, free, EXPERTS: tl.constexpr):
    """Return the first of the ``free`` experts, and those that are free then: one that was taken, and padding, has the
    number EXPERTS. Of equal ones the one with the least number is the first."""
    LEAST: tl.constexpr = -2147483648
    key = tl.where(free < EXPERTS, key, LEAST)
    found = tl.min(tl.where(key == tl.max(key), free, EXPERTS))
    return found, tl.where(free == found, EXPERTS, free)


@triton.jit
def choose_experts(
    logits_ptr, bias_ptr, scaling,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Choose the experts of the token whose logits begin at ``logits_ptr``.

    Returns:
        Their ids and weights, ``TOP_K`` padded to a power of two. Padding has the first expert and weight 0.
    """
    key, free, largest, total = _order(logits_ptr, bias_ptr, GROUPS, GROUP_SIZE, TOP_GROUPS, SIGMOID, BIAS)
    lane = tl.arange(0, triton.next_power_of_2(TOP_K))
    ids = tl.zeros(lane.shape, tl.int32)
    for k in tl.static_range(TOP_K):
        found, free = _take_first(key, free, GROUPS * GROUP_SIZE)
        ids = tl.where(lane == k, found, ids)
    # Their scores once more, by the same operations.
    mask = lane < TOP_K
    weights = tl.load(logits_ptr + ids, mask=mask, other=float("-inf"))
    if SIGMOID:
        weights = tl.sigmoid(weights)
    else:
        weights = tl.exp(weights - largest) / total
    if RENORMALISE:
        weights = weights / tl.sum(weights)
    return ids, tl.where(mask, weights * scaling, 0.0)


@triton.jit
def choose_expert(
    logits_ptr, bias_ptr, place, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Return the expert that :func:`choose_experts` has at ``place``; the first ones are found sooner."""
    key, free, _, _ = _order(logits_ptr, bias_ptr, GROUPS, GROUP_SIZE, TOP_GROUPS, SIGMOID, BIAS)
    for _ in range(place):
        _, free = _take_first(key, free, GROUPS * GROUP_SIZE)
    found, _ = _take_first(key, free, GROUPS * GROUP_SIZE)
    return found


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, scaling,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, RENORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token; the experts are a tile of groups by members."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    ids, weights = choose_experts(
        logits_ptr + token * (GROUPS * GROUP_SIZE), bias_ptr, scaling,
        GROUPS, GROUP_SIZE, TOP_GROUPS, TOP_K, SIGMOID, BIAS, RENORMALISE,
    )  # fmt: skip
    lane = tl.arange(0, triton.next_power_of_2(TOP_K))
    tl.store(ids_ptr + token * TOP_K + lane, ids, mask=lane < TOP_K)
    tl.store(weights_ptr + token * TOP_K + lane, weights, mask=lane < TOP_K)
