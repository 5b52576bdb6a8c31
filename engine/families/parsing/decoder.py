"""Reads a language model's part of config.json, in the old spelling and in that of Transformers 5."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.layers.decoder_config import DecoderConfig, RopeConfig
from engine.vision.transformer_config import VISION_ACTIVATIONS

Json = Mapping[str, Any]

_GATED_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    # What Transformers assumes where a config.json is silent; LLaVA's, for one, says almost nothing.
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "max_window_layers": 28},
    "qwen2_vl": {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "max_window_layers": 80,
        "rope_theta": 1e6,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "max_window_layers": 28,
    },
    "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}

DecoderKind = Literal["llama", "mistral", "qwen2", "qwen2_vl", "qwen3", "phi3"]


def parse_decoder(raw: Json, kind: DecoderKind) -> DecoderConfig:
    """The decoder that ``raw`` describes, a flat config.json or its text part.

    Raises:
        CheckpointError: naming the field that is missing or not supported.
    """
    config = {**_COMMON, **_DEFAULTS[kind], **{key: value for key, value in raw.items() if value is not None}}
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    layers = integer(config, "num_hidden_layers")
    qwen_bias = kind in ("qwen2", "qwen2_vl")
    attention_bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(config, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=integer(config, "num_key_value_heads") if "num_key_value_heads" in config else heads,
        head_dim=config.get("head_dim") or hidden // heads,
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope=_rope(config, config.get("head_dim") or hidden // heads),
        max_position=integer(config, "max_position_embeddings"),
        activation=_gated_activation(config["hidden_act"]),
        tie_word_embeddings=bool(config["tie_word_embeddings"]),
        qkv_bias=qwen_bias or attention_bias,
        o_bias=attention_bias and not qwen_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        windows=_windows(config, kind, layers),
    )


def integer(config: Json, field: str) -> int:
    """A positive integer field of a configuration."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(
            f"config.json: {field} should be a positive integer, not {value!r}", param=field
        )
    return value


def vision_activation(name: str, field: str = "hidden_act") -> str:
    """``name``, which ``field`` states, if towers and connectors can be run with that activation."""
    if name not in VISION_ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {field} {name!r} of the vision part is not supported; "
            f"{', '.join(VISION_ACTIVATIONS)} are",
            param=field,
        )
    return name


def checkpoint_dtype(*configs: Json) -> str:
    """The dtype that the first of ``configs`` states, bfloat16 if none does."""
    for config in configs:
        for field in ("dtype", "torch_dtype"):
            if config.get(field) in ("float32", "float16", "bfloat16"):
                return str(config[field])
    return "bfloat16"


def eos_ids(
    checkpoint: Checkpoint, text: Json, *, vocab_size: int, defaults: Iterable[int] = ()
) -> tuple[int, ...]:
    """Ids that end an answer: all that generation_config.json, config.json and the family name, in order."""
    found: list[int] = []
    for source in (checkpoint.generation_config, checkpoint.config, text):
        value = source.get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(i for i in [*found, *defaults] if 0 <= i < vocab_size))


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Quantised checkpoints would load as noise; say so instead."""
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(
            "config.json: quantization_config is not supported; use a checkpoint of the full weights",
            param="quantization_config",
        )


def _gated_activation(name: str) -> str:
    if name not in _GATED_ACTIVATIONS:
        raise CheckpointError(
            f"config.json: hidden_act {name!r} is not supported; {', '.join(_GATED_ACTIVATIONS)} are",
            param="hidden_act",
        )
    return _GATED_ACTIVATIONS[name]


def _rope(config: Json, head_dim: int) -> RopeConfig:
    stated = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = stated.get("rope_type") or stated.get("type") or "default"
    kind = {"mrope": "default", "su": "longrope"}.get(kind, kind)
    if kind not in ("default", "linear", "llama3", "longrope"):
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported", param="rope_scaling")
    partial = stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    section = stated.get("mrope_section")
    original = stated.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    rope = RopeConfig(
        theta=float(stated.get("rope_theta") or config["rope_theta"]),
        type=cast(Any, kind),
        factor=float(stated.get("factor") or 1.0),
        low_freq_factor=float(stated.get("low_freq_factor", 1.0)),
        high_freq_factor=float(stated.get("high_freq_factor", 4.0)),
        original_max_position=original,
        short_factor=tuple(stated.get("short_factor") or ()),
        long_factor=tuple(stated.get("long_factor") or ()),
        attention_factor=stated.get("attention_factor"),
        rotary_dim=None if partial == 1.0 else int(head_dim * partial),
        mrope_section=tuple(section) if section else None,
        mrope_interleaved=bool(stated.get("mrope_interleaved", False)),
    )
    _check_rope(rope, head_dim)
    return rope


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    angles = (rope.rotary_dim or head_dim) // 2
    if rope.type == "longrope" and not len(rope.short_factor) == len(rope.long_factor) == angles:
        raise CheckpointError(
            f"config.json: short_factor and long_factor should have {angles} numbers each",
            param="rope_scaling",
        )
    if rope.type in ("longrope", "llama3") and not rope.original_max_position:
        raise CheckpointError(
            f"config.json: {rope.type} needs original_max_position_embeddings", param="rope_scaling"
        )
    if rope.mrope_section is not None and (len(rope.mrope_section) != 3 or sum(rope.mrope_section) != angles):
        raise CheckpointError(
            f"config.json: mrope_section should be three numbers with sum {angles}", param="rope_scaling"
        )


def _windows(config: Json, kind: str, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    types = config.get("layer_types")
    if kind == "mistral":
        # An explicit null turns the window off, silence leaves it at its default.
        return (window,) * layers if window else ()
    if kind == "phi3":
        return (window,) * layers if window and window < config["max_position_embeddings"] else ()
    if kind == "llama" or not config.get("use_sliding_window") or not window:
        return ()
    if types:
        return tuple(window if entry == "sliding_attention" else None for entry in types)
    first = config["max_window_layers"]
    return tuple(window if index >= first else None for index in range(layers))
