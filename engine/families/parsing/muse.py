"""The decoder of Muse Glimmer: what its config.json leaves out, and what other decoders have not."""

from __future__ import annotations

from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, flag, integer, number

MUSE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 6656,
    "intermediate_size": 19968,
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "sliding_window": 2048,
    # A list of layers, or one of four, is always stated by then.
    "sliding_window_pattern": 4,
    "layer_types": None,
    "layer_rope_theta": None,
    "final_logit_softcapping": 20.0,
    "qk_scale_factor": 3.87,
    "output_multiplier": 0.19611613513818404,
    "post_norm_eps": 1e-8,
}


def muse_fields(config: Json, layers: int) -> dict[str, Any]:
    """``config`` with the kinds of its ``layers``: without a statement every fourth, counted from the last,
    has no window and doesn't rotate.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    if config["sliding_window"] is not None:
        integer(config, "sliding_window")
    full = [not (layers - 1 - layer) % 4 for layer in range(layers)]
    kinds = config["layer_types"]
    if kinds is None:
        kinds = ["full_attention" if each else "sliding_attention" for each in full]
    thetas = config["layer_rope_theta"]
    if thetas is None:
        thetas = [not each for each in full]
    if not isinstance(thetas, list | tuple) or not all(isinstance(theta, int | float) for theta in thetas):
        raise CheckpointError(
            f"config.json: layer_rope_theta should be numbers, not {thetas!r}", param="layer_rope_theta"
        )
    if len(thetas) != layers:
        raise CheckpointError(
            f"config.json: layer_rope_theta should have a number for each of {layers} layers",
            param="layer_rope_theta",
        )
    # Whatever the number, all layers that rotate have the same base.
    return {**config, "layer_types": kinds, "no_rope_layers": [int(bool(theta)) for theta in thetas]}


def muse_switches(config: Json) -> dict[str, Any]:
    """The fields of :class:`~engine.layers.decoder_config.DecoderConfig` that Muse Glimmer has of its own."""
    if flag(config, "attention_bias"):
        raise CheckpointError(
            "config.json: attention_bias true is not supported: gates have no bias", param="attention_bias"
        )
    return {
        "norm_offset": 1.0,
        "last_norm_offset": 0.0,
        "sandwich": True,
        "out_norm_eps": number(config, "post_norm_eps"),
        "embedding_norm": True,
        "qk_unit_norm": True,
        "output_gate": True,
        "gate_apart": True,
        # A factor of queries there.
        "attention_scale": number(config, "qk_scale_factor") * integer(config, "head_dim") ** -0.5,
        "logits_multiplier": number(config, "output_multiplier"),
        "logits_cap": number(config, "final_logit_softcapping"),
    }
