"""Reads a language model's part of config.json, in the old spelling and in that of Transformers 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from engine.errors import CheckpointError
from engine.families.parsing.experts import LOCAL_EXPERTS, QWEN_EXPERTS, SPARSE_LAYERS, parse_experts
from engine.families.parsing.fields import Json, activation, flag, integer, number
from engine.families.parsing.lfm2 import LFM2_DEFAULTS, lfm2_fields, lfm2_switches
from engine.families.parsing.rope import parse_ropes, stretched_context
from engine.families.parsing.windows import parse_windows, sliding_layers
from engine.layers.decoder_config import DecoderConfig, DeltaNetConfig

DecoderKind = Literal[
    "gemma",
    "glm4v_text",
    "glm_ocr_text",
    "gemma2",
    "gemma3_text",
    "granite",
    "granitemoe",
    "lfm2",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "paddleocr_vl",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen2_vl",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
]

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "num_key_value_heads": None,
    "head_dim": None,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "rms_norm_eps": 1e-6,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_QWEN_WINDOWS: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN3_5: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 248320,
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "full_attention_interval": 4,
}
_GRANITE: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
#: The value of each field that a config.json leaves out, as in Transformers' class of the kind. A null in the
#: file is not left out. Fields that a kind lacks here are not read: its model has no use for them.
_DEFAULTS: dict[DecoderKind, dict[str, Any]] = {
    "gemma": {
        **_COMMON,
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    "gemma2": {
        **_COMMON,
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "use_bidirectional_attention": None,
    },
    "gemma3_text": {
        **_COMMON,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": None,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "glm4v_text": {
        **_COMMON,
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    },
    "glm_ocr_text": {
        **_COMMON,
        "vocab_size": 59392,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    },
    "granite": {**_GRANITE, "mlp_bias": False},
    "granitemoe": {**_GRANITE, **LOCAL_EXPERTS},
    "lfm2": LFM2_DEFAULTS,
    "llama": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "ministral3": {
        **_COMMON,
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "mixtral": {
        **_COMMON,
        **LOCAL_EXPERTS,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    "paddleocr_vl": {
        **_COMMON,
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "head_dim": 128,
        "use_bias": False,
    },
    "phi3": {
        **_COMMON,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "qwen2": {**_QWEN, **_QWEN_WINDOWS},
    "qwen2_moe": {
        **_QWEN,
        **QWEN_EXPERTS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "use_sliding_window": False,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
    "qwen2_vl": {
        **_QWEN,
        **_QWEN_WINDOWS,
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_window_layers": 80,
    },
    "qwen3": {**_QWEN, **_QWEN_WINDOWS, "head_dim": 128, "attention_bias": False},
    "qwen3_5_moe_text": {
        **_QWEN3_5,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 8,
        "num_experts": 256,
    },
    "qwen3_5_text": {**_QWEN3_5, "intermediate_size": 12288, "num_key_value_heads": 4},
    "qwen3_moe": {
        **_QWEN,
        **QWEN_EXPERTS,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    "qwen3_vl": {
        **_QWEN,
        "head_dim": 128,
        "max_position_embeddings": 128000,
        "rope_theta": 5e5,
        "attention_bias": False,
    },
    "qwen3_vl_moe": {
        **_QWEN,
        **SPARSE_LAYERS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 128000,
        "rope_theta": 5e5,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
}
#: Read by every kind where config.json has them.
_EXTRA = ("rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
_BIASED_QKV = ("glm4v_text", "qwen2", "qwen2_vl")
_NORMED_QK = (
    "gemma3_text",
    "lfm2",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
)


def ties_by_default(kind: DecoderKind) -> bool:
    """Return whether the embeddings of ``kind`` are tied where its fields don't say."""
    return bool(_DEFAULTS[kind]["tie_word_embeddings"])


def parse_decoder(raw: Json, kind: DecoderKind) -> DecoderConfig:
    """Read a decoder from ``raw``, a flat config.json or its text part.

    Raises:
        CheckpointError: naming the field that is missing or not supported.
    """
    defaults = _DEFAULTS[kind]
    if "hidden_activation" in raw and kind in ("gemma2", "gemma3_text"):
        raw = {**raw, "hidden_act": raw["hidden_activation"]}
    if kind == "gemma" and raw.get("hidden_act") == "gelu":
        # Files of the first releases call the activation so.
        raw = {**raw, "hidden_act": "gelu_pytorch_tanh"}
    if kind == "lfm2":
        raw = lfm2_fields(raw)
    if "num_local_experts" in raw and "num_experts" in defaults:
        # As Transformers 5 saves what public files call num_experts.
        raw = {"num_experts": raw["num_local_experts"], **raw}
    config = {**defaults, **{key: raw[key] for key in (*defaults, *_EXTRA) if key in raw}}
    if "intermediate_size" not in defaults:
        # Every layer has experts.
        config["intermediate_size"] = config["moe_intermediate_size"]
    if config.get("rope_parameters") is None and "rope_parameters" in defaults:
        config["rope_parameters"] = defaults["rope_parameters"]
    heads = integer(config, "num_attention_heads")
    layers, positions = integer(config, "num_hidden_layers"), integer(config, "max_position_embeddings")
    head_dim = _head_dim(config, kind, heads)
    rope, local_rope = parse_ropes(config, kind, head_dim)
    # Gemma states its context after scaling.
    context = positions if local_rope else stretched_context(rope, positions)
    sliding = sliding_layers(config, layers) if local_rope else ()
    all_biases = bool(config.get("use_bias"))
    attention_bias = all_biases or ("attention_bias" in config and flag(config, "attention_bias"))
    return DecoderConfig(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        intermediate_size=integer(config, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(config, kind, heads),
        head_dim=head_dim,
        rms_norm_eps=number(config, "rms_norm_eps"),
        rope=rope,
        max_position=context,
        activation=activation(config["hidden_act"]),
        tie_word_embeddings=config["tie_word_embeddings"] is not None and flag(config, "tie_word_embeddings"),
        qkv_bias=kind in _BIASED_QKV or attention_bias or ("qkv_bias" in config and flag(config, "qkv_bias")),
        o_bias=attention_bias,
        mlp_bias=all_biases or ("mlp_bias" in config and flag(config, "mlp_bias")),
        qk_norm=kind in _NORMED_QK,
        windows=parse_windows(config, layers, context),
        experts=parse_experts(config, layers),
        local_rope=local_rope,
        local_layers=tuple(layer for layer, slides in enumerate(sliding) if slides),
        **_SWITCHES.get(kind, lambda config: {})(config),
    )


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


def _qwen3_5(config: Json) -> dict[str, Any]:
    layers, kinds = integer(config, "num_hidden_layers"), config["layer_types"]
    if kinds is None:
        interval = integer(config, "full_attention_interval")
        linear = tuple(layer for layer in range(layers) if (layer + 1) % interval)
    else:
        known = {"linear_attention", "full_attention"}
        if not isinstance(kinds, list) or len(kinds) != layers or not known.issuperset(kinds):
            raise CheckpointError(
                f"config.json: layer_types should be linear_attention or full_attention for {layers} layers",
                param="layer_types",
            )
        linear = tuple(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
    if len(linear) == layers:
        raise CheckpointError("config.json: a layer with full_attention is needed", param="layer_types")
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


#: The switches of :class:`DecoderConfig` that one kind alone has.
_SWITCHES: dict[DecoderKind, Callable[[Json], dict[str, Any]]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "glm4v_text": lambda config: {"sandwich": True},
    "glm_ocr_text": lambda config: {"sandwich": True},
    "gemma3_text": _gemma3,
    "granite": _granite,
    "lfm2": lfm2_switches,
    "qwen3_5_moe_text": _qwen3_5,
    "qwen3_5_text": _qwen3_5,
    "granitemoe": _granite,
}


def _head_dim(config: Json, kind: DecoderKind, heads: int) -> int:
    hidden = integer(config, "hidden_size")
    # PaddleOCR-VL has a default, but a null means the share of the hidden size.
    derived = _DEFAULTS[kind]["head_dim"] is None or kind == "paddleocr_vl"
    if config["head_dim"] is None and derived:
        head_dim = hidden // heads
    else:
        head_dim = integer(config, "head_dim", least=2)
    if head_dim < 2 or head_dim % 2 or (kind == "qwen2_vl" and head_dim * heads != hidden):
        raise CheckpointError(
            f"config.json: {heads} heads of {head_dim} don't suit a hidden_size of {hidden}",
            param="num_attention_heads" if config["head_dim"] is None else "head_dim",
        )
    return head_dim


def _kv_heads(config: Json, kind: DecoderKind, heads: int) -> int:
    if config["num_key_value_heads"] is None and kind not in ("mistral", "ministral3"):
        return heads
    kv_heads = integer(config, "num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_key_value_heads {kv_heads} should divide num_attention_heads {heads}",
            param="num_key_value_heads",
        )
    return kv_heads
