"""Reads what Cohere's config.json has of its own: the scale of logits, and another name of a usual field."""

from __future__ import annotations

from typing import Any

from engine.families.parsing.fields import Json, number

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


def cohere_fields(raw: Json) -> Json:
    """``raw`` under the names that other models' files have."""
    return {**raw, "rms_norm_eps": raw["layer_norm_eps"]} if "layer_norm_eps" in raw else raw


def cohere_switches(config: Json) -> dict[str, Any]:
    """The fields of :class:`~engine.layers.decoder_config.DecoderConfig` that Cohere's models have of
    their own."""
    return {
        "parallel": True,
        "logits_divisor": 1 / number(config, "logit_scale"),
        "qk_layer_norm": bool(config.get("use_qk_norm")),
    }
