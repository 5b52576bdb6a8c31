"""Reads what Gemma 4's config.json has of its own: heads by the kind of a layer, borrowed keys and values,
and inputs of each layer."""

from __future__ import annotations

from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, flag, integer, number
from engine.layers.decoder_config import LayerInputsConfig

GEMMA4_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "local_heads": None,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "attention_bias": False,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "layer_types": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
#: Of Gemma 4 unified, whose files state neither inputs of layers nor experts.
UNIFIED_DEFAULTS: dict[str, Any] = {
    **GEMMA4_DEFAULTS,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
}
#: The kinds of decoder that have the layers of Gemma 4.
GEMMA4_KINDS = ("gemma4_text", "gemma4_unified_text")
#: Fields of layers with full attention in files of Transformers 5.23, under ``per_layer_config``.
_OF_LAYERS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPES: dict[str, dict[str, Any]] = {
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}


def gemma4_fields(raw: Json) -> Json:
    """``raw`` with the heads of the layers with full attention under the usual names, those of the others as
    ``local_heads``, and the kind of each layer.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    config = {**GEMMA4_DEFAULTS, **raw}
    layers = integer(config, "num_hidden_layers")
    kinds = config["layer_types"]
    if kinds is None:
        kinds = [_SLIDING if (layer + 1) % 6 else _FULL for layer in range(layers)]
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise CheckpointError(
            f"config.json: layer_types should name {_FULL} or {_SLIDING} for each of {layers} layers",
            param="layer_types",
        )
    # The last layer is one with full attention whatever the file says.
    kinds = [*kinds[:-1], _FULL]
    stated = _of_full_layers(config, [layer for layer, kind in enumerate(kinds) if kind == _FULL])
    local = integer(config, "num_key_value_heads"), integer(config, "head_dim", least=2)
    heads = stated.get("num_global_key_value_heads")
    if config.get("global_head_dim") is None and "per_layer_config" not in config:
        stated = {"global_head_dim": 512, **stated}
    ropes = config.get("rope_parameters") or _ROPES
    return {
        **raw,
        "layer_types": kinds,
        "local_heads": local,
        "num_key_value_heads": local[0] if heads is None or not config["attention_k_eq_v"] else heads,
        "head_dim": stated.get("global_head_dim", local[1]),
        "rope_scaling": None,
        "rope_parameters": ropes,
    }


def _of_full_layers(config: Json, layers: list[int]) -> dict[str, Any]:
    """The heads of layers with full attention: stated once, or for each of them."""
    if "per_layer_config" not in config:
        return {name: config[name] for name in _OF_LAYERS.values() if config.get(name) is not None}
    table: Any = config["per_layer_config"]
    if not isinstance(table, dict):
        raise CheckpointError("config.json: per_layer_config should be an object", param="per_layer_config")
    found = [table.get(str(layer), table.get(layer)) for layer in layers]
    surplus = set(map(str, table)) - set(map(str, layers))
    if surplus or any(each != found[0] for each in found) or not isinstance(found[0], dict | None):
        raise CheckpointError(
            "config.json: per_layer_config should have the same fields for each layer with full_attention, "
            "and none for others",
            param="per_layer_config",
        )
    fields = found[0] or {}
    if fields.keys() - _OF_LAYERS.keys():
        raise CheckpointError(
            f"config.json: per_layer_config should have no fields but {', '.join(_OF_LAYERS)}",
            param="per_layer_config",
        )
    return {_OF_LAYERS[name]: value for name, value in fields.items()}


def gemma4_switches(config: Json) -> dict[str, Any]:
    """The fields of :class:`~engine.layers.decoder_config.DecoderConfig` that Gemma 4 has of its own.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    both_ways = config["use_bidirectional_attention"]
    if both_ways not in (None, False, "vision"):
        raise CheckpointError(
            f"config.json: use_bidirectional_attention {both_ways!r} is not supported",
            param="use_bidirectional_attention",
        )
    kinds, borrowing = config["layer_types"], integer(config, "num_kv_shared_layers", least=0)
    if borrowing and (borrowing >= len(kinds) or set(kinds[:-borrowing]) != set(kinds)):
        raise CheckpointError(
            f"config.json: num_kv_shared_layers {borrowing} leaves no layer of some kind that has keys and "
            "values",
            param="num_kv_shared_layers",
        )
    width, cap = integer(config, "hidden_size_per_layer_input", least=0), config["final_logit_softcapping"]
    rows = integer(config, "vocab_size_per_layer_input")
    if width and rows < integer(config, "vocab_size"):
        raise CheckpointError(
            f"config.json: vocab_size_per_layer_input {rows} should be vocab_size or more",
            param="vocab_size_per_layer_input",
        )
    wide = flag(config, "use_double_wide_mlp")
    return {
        "norm_offset": 0.0,
        "sandwich": True,
        "embedding_multiplier": integer(config, "hidden_size") ** 0.5,
        "attention_scale": 1.0,
        "logits_cap": None if cap is None else number(config, "final_logit_softcapping"),
        "local_heads": config["local_heads"],
        "keys_are_values": flag(config, "attention_k_eq_v"),
        "value_norm": True,
        "num_borrowing": borrowing,
        "borrowing_size": 2 * integer(config, "intermediate_size") if wide else None,
        "local_both_ways": True,
        "layer_inputs": LayerInputsConfig(width, rows) if width else None,
        "layer_scales": True,
    }
