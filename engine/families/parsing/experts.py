"""Reads the mixture of experts of a language model from config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, flag, integer, layer_list, number
from engine.kernels.router_config import RouterConfig
from engine.layers.experts_config import ExpertsConfig

LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
"""Defaults of the fields of Mixtral and Granite, whose layers all have experts."""

SPARSE_LAYERS: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": None}
"""Defaults of the fields of Qwen's models in which some layers may have no experts."""

QWEN_EXPERTS: dict[str, Any] = {**SPARSE_LAYERS, "norm_topk_prob": False}
"""Defaults of the fields of Qwen's models whose routers may leave weights as they are."""

ROUTED_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
"""Defaults of the fields of GLM's models, which have DeepSeek-V3's router."""


def parse_experts(config: Json, layers: int) -> ExpertsConfig | None:
    """Read the experts of a decoder; None if its kind has none.

    Args:
        config: the fields of config.json over the defaults of the kind.
        layers: number of layers.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    if "n_routed_experts" in config:
        return _routed_experts(config, layers)
    if "enable_moe_block" in config:
        return _experts_beside_mlps(config, layers) if flag(config, "enable_moe_block") else None
    if "num_local_experts" in config:
        router = _router(config, "num_local_experts", renormalise=True)
        return ExpertsConfig(router, integer(config, "intermediate_size"), tuple(range(layers)))
    if "num_experts" not in config:
        return None
    if config.get("use_sliding_window") and "sliding_window" not in config:
        raise CheckpointError(
            "config.json: use_sliding_window is not supported for this architecture",
            param="use_sliding_window",
        )
    sparse = _sparse_layers(config, layers)
    if not sparse:
        return None
    shared = "shared_expert_intermediate_size"
    # The classes of Qwen3-VL-MoE and Qwen3.5-MoE don't read the field.
    renormalise = "norm_topk_prob" not in config or flag(config, "norm_topk_prob")
    return ExpertsConfig(
        _router(config, "num_experts", renormalise=renormalise),
        integer(config, "moe_intermediate_size"),
        sparse,
        shared_size=integer(config, shared) if shared in config else None,
        shared_gate=shared in config,
    )


def _routed_experts(config: Json, layers: int) -> ExpertsConfig | None:
    """Read experts whose scores are sigmoids, and of which the best groups are chosen by biased scores."""
    groups, kept = integer(config, "n_group"), integer(config, "topk_group")
    router = _router(config, "n_routed_experts", renormalise=flag(config, "norm_topk_prob"))
    members = router.num_experts // groups
    # The sum of two experts decides on a group.
    if router.num_experts % groups or members < 2 or kept > groups or router.top_k > members * kept:
        raise CheckpointError(
            f"config.json: n_group {groups} and topk_group {kept} don't suit {router.num_experts} experts, "
            f"of which a token has {router.top_k}",
            param="n_group",
        )
    sparse = tuple(range(integer(config, "first_k_dense_replace", least=0), layers))
    if not sparse:
        return None
    size = integer(config, "moe_intermediate_size")
    router = replace(
        router,
        scoring="sigmoid",
        scaling=number(config, "routed_scaling_factor"),
        correction_bias=True,
        num_groups=groups,
        top_groups=kept,
    )
    return ExpertsConfig(router, size, sparse, shared_size=size * integer(config, "n_shared_experts"))


def _experts_beside_mlps(config: Json, layers: int) -> ExpertsConfig:
    """Read the experts of a Gemma 4, which every layer has beside its MLP."""
    router = _router(config, "num_experts", renormalise=True, of_token="top_k_experts")
    size = integer(config, "moe_intermediate_size")
    return ExpertsConfig(router, size, tuple(range(layers)), beside_mlp=True)


def _router(
    config: Json, field: str, *, renormalise: bool, of_token: str = "num_experts_per_tok"
) -> RouterConfig:
    experts, top_k = integer(config, field), integer(config, of_token)
    if top_k > experts:
        raise CheckpointError(
            f"config.json: {of_token} {top_k} should be at most {field} {experts}", param=of_token
        )
    return RouterConfig(experts, top_k, renormalise=renormalise)


def _sparse_layers(config: Json, layers: int) -> tuple[int, ...]:
    """The layers with experts: each last one of ``decoder_sparse_step``, but for ``mlp_only_layers``."""
    if "mlp_only_layers" not in config:
        return tuple(range(layers))
    if integer(config, "num_experts", least=0) == 0:
        return ()
    dense = () if config["mlp_only_layers"] is None else layer_list(config, "mlp_only_layers")
    step = integer(config, "decoder_sparse_step")
    return tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
