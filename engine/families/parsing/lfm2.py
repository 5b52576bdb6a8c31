"""Reads what LFM2's config.json has of its own: short convolutions, and an older spelling."""

from __future__ import annotations

from typing import Any

from engine.families.parsing.fields import Json, flag, integer, layer_list, number
from engine.families.parsing.recurrent import recurrent_layers
from engine.layers.decoder_config import ShortConvConfig

LFM2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": None,
    "full_attn_idxs": None,
}
_MLP_DEFAULTS: dict[str, Any] = {
    "intermediate_size": 12288,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
}


def lfm2_fields(raw: Json) -> Json:
    """``raw`` under the names that other models' files have.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    fields = {key: value for key, value in raw.items() if key != "hidden_act"}
    if "norm_eps" in raw:
        fields["rms_norm_eps"] = raw["norm_eps"]
    if "tie_embedding" in raw:
        fields["tie_word_embeddings"] = raw["tie_embedding"]
    fields["intermediate_size"] = _intermediate_size({**_MLP_DEFAULTS, **raw})
    return fields


def _intermediate_size(raw: Json) -> int:
    """Two thirds of the stated size times a factor, rounded up; or the stated size as it is."""
    size = integer(raw, "block_ff_dim" if "block_ff_dim" in raw else "intermediate_size")
    if not flag(raw, "block_auto_adjust_ff_dim"):
        return size
    size = int(2 * size / 3)
    if raw["block_ffn_dim_multiplier"] is None:
        return size
    multiple = integer(raw, "block_multiple_of")
    return -(-int(number(raw, "block_ffn_dim_multiplier") * size) // multiple) * multiple


def lfm2_switches(config: Json) -> dict[str, Any]:
    """The layers with a short convolution in place of attention.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    layers, kinds = integer(config, "num_hidden_layers"), config["layer_types"]
    if kinds is None:
        full = range(layers) if config["full_attn_idxs"] is None else layer_list(config, "full_attn_idxs")
        kinds = ["full_attention" if layer in full else "conv" for layer in range(layers)]
    convolved = recurrent_layers(kinds, layers, "conv")
    conv = ShortConvConfig(
        width=integer(config, "hidden_size"),
        conv_width=integer(config, "conv_L_cache", least=2),
        bias=flag(config, "conv_bias"),
    )
    return {"recurrence": conv if convolved else None, "linear_layers": convolved}
