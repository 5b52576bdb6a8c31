"""Reads what the config.json of LFM2 and LFM3 has of its own: short convolutions, and older spellings."""

from __future__ import annotations

from typing import Any

from engine.errors import CheckpointError
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
LFM3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128000,
    "hidden_size": 2048,
    "intermediate_size": 7680,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 256,
    "sliding_window_pattern": 4,
    "layer_types": None,
    "linear_layers": (),
    "conv_bias": False,
    "conv_L_cache": 7,
    "use_sandwich_norm": True,
    "use_attention_gate": True,
}
_FULL, _SLIDING, _CONV = "full_attention", "sliding_attention", "conv"
_ROPES: dict[str, dict[str, Any]] = {
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e6},
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
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
    return {"recurrence": _short_conv(config) if convolved else None, "linear_layers": convolved}


def lfm3_fields(raw: Json) -> Json:
    """``raw`` with the layers that have a short convolution as ``linear_layers``; among ``layer_types`` they
    are as layers without a window.

    Full attention whose type is ``default`` and that states a share of a head is ``proportional``: public
    files are so, of models that were trained by the latter.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    config = {**LFM3_DEFAULTS, **raw}
    layers, kinds = integer(config, "num_hidden_layers"), config["layer_types"]
    if kinds is None:
        kinds = [
            _FULL if layer % 4 == 2 else _CONV if layer % 4 or not layer else _SLIDING
            for layer in range(layers)
        ]
    known = {_FULL, _SLIDING, _CONV}
    if not isinstance(kinds, list) or len(kinds) != layers or not known.issuperset(map(str, kinds)):
        raise CheckpointError(
            f"config.json: layer_types should name {', '.join(sorted(known))} for each of {layers} layers",
            param="layer_types",
        )
    if set(kinds) == {_CONV}:
        raise CheckpointError("config.json: a layer with attention is needed", param="layer_types")
    fields = {key: value for key, value in raw.items() if key != "hidden_act"}
    if "norm_eps" in raw:
        fields["rms_norm_eps"] = raw["norm_eps"]
    return {
        **fields,
        "layer_types": [_FULL if kind == _CONV else kind for kind in kinds],
        "linear_layers": tuple(layer for layer, kind in enumerate(kinds) if kind == _CONV),
        "rope_scaling": None,
        "rope_parameters": _lfm3_ropes(raw.get("rope_parameters") or _ROPES, config["rope_theta"]),
    }


def _lfm3_ropes(stated: Any, theta: Any) -> dict[str, Any]:
    if not isinstance(stated, dict) or not all(isinstance(each, dict | None) for each in stated.values()):
        raise CheckpointError(
            f"config.json: rope_parameters should be objects by {_FULL} and {_SLIDING}",
            param="rope_parameters",
        )
    full = stated.get(_FULL) or {}
    # Stated parameters without a base have the same one for both kinds of layers.
    sliding = {"rope_theta": theta, **(stated.get(_SLIDING) or {})}
    if full.get("rope_type", "default") == "default" and full.get("partial_rotary_factor", 1.0) != 1.0:
        full = {**full, "rope_type": "proportional"}
    return {**stated, _FULL: full, _SLIDING: sliding}


def lfm3_switches(config: Json) -> dict[str, Any]:
    """The fields of :class:`~engine.layers.decoder_config.DecoderConfig` that LFM3 has of its own.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    gated = flag(config, "use_attention_gate")
    if gated and flag(config, "attention_bias"):
        raise CheckpointError(
            "config.json: attention_bias is not supported with use_attention_gate", param="attention_bias"
        )
    return {
        "recurrence": _short_conv(config) if config["linear_layers"] else None,
        "linear_layers": config["linear_layers"],
        "sandwich": flag(config, "use_sandwich_norm"),
        "head_gate": gated,
    }


def _short_conv(config: Json) -> ShortConvConfig:
    return ShortConvConfig(
        width=integer(config, "hidden_size"),
        conv_width=integer(config, "conv_L_cache", least=2),
        bias=flag(config, "conv_bias"),
    )
