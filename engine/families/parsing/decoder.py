"""Reads a language model's part of config.json, in the old spelling and in that of Transformers 5."""

from __future__ import annotations

from engine.errors import CheckpointError
from engine.families.parsing.cohere import cohere_fields, cohere_moe_fields
from engine.families.parsing.defaults import DEFAULTS, DecoderKind
from engine.families.parsing.experts import parse_experts
from engine.families.parsing.fields import Json, activation, flag, integer, number
from engine.families.parsing.gemma4 import GEMMA4_KINDS, gemma4_fields
from engine.families.parsing.lfm2 import lfm2_fields, lfm3_fields
from engine.families.parsing.muse import muse_fields
from engine.families.parsing.rope import parse_ropes, stretched_context
from engine.families.parsing.switches import SWITCHES
from engine.families.parsing.windows import local_layers, parse_windows, window_rotates
from engine.layers.decoder_config import DecoderConfig

#: Read by every kind where config.json has them.
_EXTRA = ("rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
#: Kinds whose files call the activation ``hidden_activation``.
_NAMED_ACTIVATION = ("gemma2", "gemma3_text", *GEMMA4_KINDS, "muse_glimmer_text")
_BIASED_QKV = ("glm4v_text", "qwen2", "qwen2_vl")
#: Kinds whose ``attention_bias`` is that of queries, keys and values alone.
_UNBIASED_OUTPUT = ("glm", "glm4", "glm4_moe", "glm4v_moe_text", "molmo2_text")
_NORMED_QK = (
    "exaone4",
    "gemma3_text",
    *GEMMA4_KINDS,
    "hunyuan_v1_dense",
    "hunyuan_vl_text",
    "lfm2",
    "lfm3",
    "molmo2_text",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
)


def parse_decoder(raw: Json, kind: DecoderKind) -> DecoderConfig:
    """Read a decoder from ``raw``, a flat config.json or its text part.

    Raises:
        CheckpointError: naming the field that is missing or not supported.
    """
    defaults = DEFAULTS[kind]
    if "hidden_activation" in raw and kind in _NAMED_ACTIVATION:
        raw = {**raw, "hidden_act": raw["hidden_activation"]}
    if kind == "gemma" and raw.get("hidden_act") == "gelu":
        # Files of the first releases call the activation so.
        raw = {**raw, "hidden_act": "gelu_pytorch_tanh"}
    if kind in ("cohere", "cohere2"):
        raw = cohere_fields(raw)
    if kind == "lfm2":
        raw = lfm2_fields(raw)
    if kind == "lfm3":
        raw = lfm3_fields(raw)
    if kind in GEMMA4_KINDS:
        raw = gemma4_fields(raw)
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
    if kind == "cohere2_moe":
        config = cohere_moe_fields(config, layers)
    if kind == "muse_glimmer_text":
        config = muse_fields(config, layers)
    if kind == "cohere2" or (kind == "exaone4" and config["sliding_window"] is not None):
        config = window_rotates(config, layers)
    head_dim = _head_dim(config, kind, heads)
    local_dim = config["local_heads"][1] if "local_heads" in config else head_dim
    rope, local_rope = parse_ropes(config, kind, head_dim, local_dim)
    # Gemma states its context after scaling.
    context = positions if "rope_local_base_freq" in config else stretched_context(rope, positions)
    all_biases = bool(config.get("use_bias"))
    attention_bias = all_biases or ("attention_bias" in config and flag(config, "attention_bias"))
    return DecoderConfig(
        vocab_size=integer(config, "vocab_size") + config.get("additional_vocab_size", 0),
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
        o_bias=flag(config, "attention_out_bias")
        if "attention_out_bias" in config
        else attention_bias and kind not in _UNBIASED_OUTPUT,
        mlp_bias=all_biases or ("mlp_bias" in config and flag(config, "mlp_bias")),
        qk_norm=kind in _NORMED_QK or bool(config.get("use_qk_norm")),
        windows=parse_windows(config, layers, context),
        experts=parse_experts(config, layers),
        local_rope=local_rope,
        local_layers=local_layers(config, layers) if local_rope else (),
        **SWITCHES.get(kind, lambda config: {})(config),
    )


def _head_dim(config: Json, kind: DecoderKind, heads: int) -> int:
    hidden = integer(config, "hidden_size")
    # Some have a default, but a null means the share of the hidden size.
    derived = DEFAULTS[kind]["head_dim"] is None or kind in ("ernie4_5", "paddleocr_vl", "seed_oss")
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
