"""Reads what Cohere's config.json has of its own: the scale of logits, and another name of a usual field."""

from __future__ import annotations

from typing import Any

from engine.families.parsing.experts import typed_layers
from engine.families.parsing.fields import Json, integer, number
from engine.families.parsing.windows import sliding_layers

COHERE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
    "attention_bias": False,
    "logit_scale": 0.0625,
    "use_qk_norm": False,
}
COHERE2_DEFAULTS: dict[str, Any] = {
    **{field: value for field, value in COHERE_DEFAULTS.items() if field != "use_qk_norm"},
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "layer_types": None,
}


COHERE2_MOE_DEFAULTS: dict[str, Any] = {
    **COHERE2_DEFAULTS,
    "head_dim": 128,
    "rms_norm_eps": None,
    "layer_norm_eps": 1e-5,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 0,
    "shared_expert_combination_strategy": "average",
    "expert_selection_fn": "softmax",
    "norm_topk_prob": True,
    "prefix_dense_intermediate_size": None,
    "prefix_dense_sliding_window_pattern": 1,
    "first_k_dense_replace": 0,
    "mlp_layer_types": None,
}


def cohere_fields(raw: Json) -> Json:
    """``raw`` under the names that other models' files have."""
    return {**raw, "rms_norm_eps": raw["layer_norm_eps"]} if "layer_norm_eps" in raw else raw


def cohere_moe_fields(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """``config``, the fields over their defaults, with those that other models' files have: the kind of each
    layer's attention and MLP, whether it rotates, the eps of its norms, and the sizes of MLPs and experts.

    The first layers, which have no experts, may have windows in a pattern of their own. With a pattern of 1
    they have none, and rotate all the same.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    first = min(integer(config, "first_k_dense_replace", least=0), layers)
    own = integer(config, "prefix_dense_sliding_window_pattern")
    rest = integer(config, "sliding_window_pattern")
    slides = [bool((layer + 1) % own) for layer in range(first)]
    slides += [bool((layer + 1) % rest) for layer in range(layers - first)]
    filled = {"layer_types": ["sliding_attention" if each else "full_attention" for each in slides]}
    filled["mlp_layer_types"] = ["dense"] * first + ["sparse"] * (layers - first)
    stated = {field: config[field] for field in filled if config[field] is not None}
    norm = "layer_norm_eps" if config["rms_norm_eps"] is None else "rms_norm_eps"
    config = {
        **config,
        **filled,
        **stated,
        "rms_norm_eps": config[norm],
        "layer_norms": norm != "rms_norm_eps",
    }
    dense = set(range(layers)) - set(typed_layers(config, layers))
    rotates = [
        int(slides or (own == 1 and layer in dense))
        for layer, slides in enumerate(sliding_layers(config, layers))
    ]
    if any(rotates):
        integer(config, "sliding_window")
    size = config["intermediate_size"]
    dense_size = config["prefix_dense_intermediate_size"] or size
    sizes = {"moe_intermediate_size": size, "intermediate_size": dense_size}
    return {**config, "no_rope_layers": rotates, **sizes}


def cohere_switches(config: Json) -> dict[str, Any]:
    """The fields of :class:`~engine.layers.decoder_config.DecoderConfig` that Cohere's models have of
    their own."""
    return {
        "parallel": True,
        "layer_norms": config.get("layer_norms", True),
        "logits_multiplier": number(config, "logit_scale"),
        "qk_layer_norm": bool(config.get("use_qk_norm")),
    }
