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

ERNIE_EXPERTS: dict[str, Any] = {
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_norm_min": 1e-12,
}
"""Defaults of the fields of Ernie's models."""

DEEPSEEK_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 1407,
    "num_experts_per_tok": None,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "mlp_layer_types": None,
}
"""Defaults of the fields of DeepSeek-OCR 2, which has DeepSeek-V2's router."""

#: The greatest ``moe_norm_min`` that is served. The weights of a token's experts are divided by their sum, or
#: by ``moe_norm_min`` if the sum is less. This engine divides by the sum alone, which it takes to be greater.
_GREATEST_LEAST_SUM = 1e-6


def parse_experts(config: Json, layers: int) -> ExpertsConfig | None:
    """Read the experts of a decoder; None if its kind has none.

    Args:
        config: the fields of config.json over the defaults of the kind.
        layers: number of layers.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    if "moe_num_experts" in config:
        return _biased_experts(config, layers)
    if "expert_selection_fn" in config:
        return _cohere_experts(config, layers)
    if "topk_method" in config:
        return _scaled_experts(config, layers)
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


def _biased_experts(config: Json, layers: int) -> ExpertsConfig | None:
    """Read Ernie's experts, which are chosen by biased softmax scores; of a VLM, tokens of images and videos
    have others, of which there are as many."""
    router = replace(
        _router(config, "moe_num_experts", renormalise=True, of_token="moe_k"), correction_bias=True
    )
    if number(config, "moe_norm_min") > _GREATEST_LEAST_SUM:
        raise CheckpointError(
            f"config.json: moe_norm_min {config['moe_norm_min']} should be at most {_GREATEST_LEAST_SUM:g}",
            param="moe_norm_min",
        )
    if config["use_bias"]:
        raise CheckpointError("config.json: use_bias is not supported beside experts", param="use_bias")
    field, vision = "moe_intermediate_size", "mlp_layer_types" in config
    sizes = config[field] if vision else [config[field]]
    if not isinstance(sizes, list) or len(sizes) != 1 + vision:
        raise CheckpointError(
            f"config.json: {field} should be two sizes, for text and for media, not {sizes!r}", param=field
        )
    size, *others = (integer({field: size}, field) for size in sizes)
    sparse = typed_layers(config, layers) if vision else _layers_between(config, layers)
    if not sparse:
        return None
    shared = integer(config, "moe_num_shared_experts", least=0)
    return ExpertsConfig(
        router, size, sparse, shared_size=size * shared or None, vision_size=others[0] if others else None
    )


def typed_layers(config: Json, layers: int) -> tuple[int, ...]:
    """The layers that ``mlp_layer_types`` calls sparse; all but the first where it is missing."""
    types = config["mlp_layer_types"]
    if types is None:
        return tuple(range(1, layers))
    known = isinstance(types, list) and all(kind in ("dense", "sparse") for kind in types)
    if not known or len(types) < layers:
        raise CheckpointError(
            f"config.json: mlp_layer_types should be 'dense' or 'sparse' for {layers} layers, not {types!r}",
            param="mlp_layer_types",
        )
    return tuple(layer for layer in range(layers) if types[layer] == "sparse")


def _layers_between(config: Json, layers: int) -> tuple[int, ...]:
    """The layers from ``moe_layer_start_index`` to ``moe_layer_end_index``, each last one of an interval."""
    first, step = integer(config, "moe_layer_start_index", least=0), integer(config, "moe_layer_interval")
    last = integer(config, "moe_layer_end_index", least=-1)
    last = layers - 1 if last == -1 else min(last, layers - 1)
    return tuple(layer for layer in range(first, last + 1) if (layer + 1) % step == 0)


def _scaled_experts(config: Json, layers: int) -> ExpertsConfig | None:
    """Read experts whose scores are shares of all, and multiplied by a factor; the layers are listed."""
    for field, served in (("topk_method", "greedy"), ("mlp_bias", False)):
        if config[field] != served:
            raise CheckpointError(
                f"config.json: {field} {config[field]!r} is not supported for this architecture; "
                f"{served!r} is",
                param=field,
            )
    sparse = typed_layers(config, layers)
    if not sparse:
        return None
    router = _router(config, "n_routed_experts", renormalise=False)
    router = replace(router, scaling=number(config, "routed_scaling_factor"))
    size = integer(config, "moe_intermediate_size")
    return ExpertsConfig(router, size, sparse, shared_size=size * integer(config, "n_shared_experts"))


def _cohere_experts(config: Json, layers: int) -> ExpertsConfig | None:
    """Read Cohere's experts: shares of those that are chosen, or sigmoids, and the shared expert's part."""
    scoring, joined = config["expert_selection_fn"], config["shared_expert_combination_strategy"]
    for field, value, known in (
        ("expert_selection_fn", scoring, ("softmax", "sigmoid")),
        ("shared_expert_combination_strategy", joined, ("average", "sum")),
    ):
        if value not in known:
            raise CheckpointError(f"config.json: {field} {value!r} is not supported", param=field)
    sparse = typed_layers(config, layers)
    if not sparse:
        return None
    # A softmax over the chosen ones is one over all, divided by their sum.
    renormalise = scoring == "softmax" or flag(config, "norm_topk_prob")
    router = replace(_router(config, "num_experts", renormalise=renormalise), scoring=scoring)
    size = integer(config, "moe_intermediate_size")
    shared = integer(config, "num_shared_experts", least=0) * size
    averaged = bool(shared) and joined == "average"
    return ExpertsConfig(router, size, sparse, shared_size=shared or None, averaged=averaged)


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
