"""The switches of a decoder that few kinds have: scales, caps, gates and recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.cohere import cohere_switches
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, activation, flag, integer, number
from engine.families.parsing.gemma4 import gemma4_switches
from engine.families.parsing.lfm2 import lfm2_switches, lfm3_switches
from engine.families.parsing.muse import muse_switches
from engine.families.parsing.recurrent import recurrent_layers
from engine.layers.decoder_config import DeltaNetConfig


def _gemma(config: Json) -> dict[str, Any]:
    for field in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if config.get(field):
            raise CheckpointError(f"config.json: {field} {config[field]!r} is not supported", param=field)
    return {"norm_offset": 1.0, "embedding_multiplier": integer(config, "hidden_size") ** 0.5}


def _gemma2(config: Json) -> dict[str, Any]:
    caps = {"final_logit_softcapping": "logits_cap", "attn_logit_softcapping": "attention_cap"}
    found = {name: number(config, field) for field, name in caps.items() if config[field] is not None}
    return {**_gemma3({**config, **dict.fromkeys(caps)}), **found}


def _gemma3(config: Json) -> dict[str, Any]:
    return {
        **_gemma(config),
        "sandwich": True,
        "attention_scale": number(config, "query_pre_attn_scalar") ** -0.5,
    }


def _granite(config: Json) -> dict[str, Any]:
    return {
        "embedding_multiplier": number(config, "embedding_multiplier"),
        "multiplies_rows": True,
        "residual_multiplier": number(config, "residual_multiplier"),
        "logits_divisor": number(config, "logits_scaling"),
        "attention_scale": number(config, "attention_multiplier"),
    }


def _hyperclovax(config: Json) -> dict[str, Any]:
    # Granite with norms behind attention and MLP, whose logits are multiplied by what divides them there.
    scaled = config["attention_multiplier"] is not None
    return {
        **_granite({**config, "attention_multiplier": 1.0}),
        "attention_scale": number(config, "attention_multiplier") if scaled else None,
        "logits_divisor": 1.0,
        "logits_multiplier": number(config, "logits_scaling"),
        "sandwich": flag(config, "use_post_norm"),
    }


def _qwen3_5(config: Json) -> dict[str, Any]:
    layers, kinds = integer(config, "num_hidden_layers"), config["layer_types"]
    if kinds is None:
        interval = integer(config, "full_attention_interval")
        full = [not (layer + 1) % interval for layer in range(layers)]
        kinds = ["full_attention" if attends else "linear_attention" for attends in full]
    linear = recurrent_layers(kinds, layers, "linear_attention")
    if linear and activation(config["hidden_act"]) != "silu":
        raise CheckpointError(
            f"config.json: hidden_act {config['hidden_act']!r} is not supported with linear_attention "
            "layers; silu is",
            param="hidden_act",
        )
    net = DeltaNetConfig(
        key_heads=integer(config, "linear_num_key_heads"),
        value_heads=integer(config, "linear_num_value_heads"),
        key_dim=integer(config, "linear_key_head_dim"),
        value_dim=integer(config, "linear_value_head_dim"),
        conv_width=integer(config, "linear_conv_kernel_dim", least=2),
    )
    if net.value_heads % net.key_heads:
        raise CheckpointError(
            f"config.json: linear_num_key_heads {net.key_heads} should divide linear_num_value_heads "
            f"{net.value_heads}",
            param="linear_num_key_heads",
        )
    return {
        "norm_offset": 1.0,
        "output_gate": True,
        "recurrence": net if linear else None,
        "linear_layers": linear,
    }


#: Norms scale in float32.
_OLMO: dict[str, Any] = {"post_norm": True, "qk_norm_whole": True, "norm_offset": 0.0}


def _molmo2(config: Json) -> dict[str, Any]:
    norm = config["qk_norm_type"]
    if norm not in ("qwen3", "olmo"):
        raise CheckpointError(f"config.json: qk_norm_type {norm!r} is not supported", param="qk_norm_type")
    return {
        "unpredicted": integer(config, "additional_vocab_size", least=0),
        "qk_norm_whole": norm == "olmo",
        "post_norm": flag(config, "norm_after"),
    }


#: By kind, the fields of :class:`~engine.layers.decoder_config.DecoderConfig` that other kinds leave at their
#: defaults.
SWITCHES: dict[DecoderKind, Callable[[Json], dict[str, Any]]] = {
    "cohere": cohere_switches,
    "cohere2": cohere_switches,
    "cohere2_moe": cohere_switches,
    "exaone4": lambda config: {"post_norm": True},
    "gemma": _gemma,
    "gemma2": _gemma2,
    "glm4": lambda config: {"sandwich": True},
    "glm4v_text": lambda config: {"sandwich": True},
    "glm_ocr_text": lambda config: {"sandwich": True},
    "gemma3_text": _gemma3,
    "gemma4_text": gemma4_switches,
    "gemma4_unified_text": gemma4_switches,
    "granite": _granite,
    "granite_docling_text": _granite,
    "hunyuan_v1_dense": lambda config: {"qk_norm_last": True},
    "hunyuan_vl_text": lambda config: {"qk_norm_last": True},
    "hyperclovax": _hyperclovax,
    "lfm2": lfm2_switches,
    "lfm3": lfm3_switches,
    "molmo2_text": _molmo2,
    "muse_glimmer_text": muse_switches,
    "olmo2": lambda config: _OLMO,
    "olmo3": lambda config: _OLMO,
    "qwen3_5_moe_text": _qwen3_5,
    "qwen3_5_text": _qwen3_5,
    "granitemoe": _granite,
}
