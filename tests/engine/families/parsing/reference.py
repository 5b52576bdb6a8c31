"""Transformers' reading of a decoder's fields, taken from the modules that its classes build from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRTextConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from engine.kernels.activation import ACTIVATIONS
from engine.layers.decoder_config import DecoderConfig
from engine.layers.rotary import inverse_frequencies

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "ministral3": (transformers.Ministral3Config, transformers.Ministral3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "paddleocr_vl": (PaddleOCRTextConfig, PaddleOCRTextModel),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen2_vl": (transformers.Qwen2VLTextConfig, Qwen2VLTextModel),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_vl": (transformers.Qwen3VLTextConfig, Qwen3VLTextModel),
}
#: Lengths of sequences for which frequencies are compared: below, at and above every original context.
LENGTHS = (7, 32, 33, 64, 65, 129, 300)
_ACTIVATED = torch.linspace(-3, 3, 31)


class Refused(Exception):
    """Transformers can't make or run a model of these fields."""


def reference_view(kind: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides a decoder's outputs, by name, as Transformers has it.

    Raises:
        Refused: it raises for ``raw``.
    """
    config_class, model_class = CLASSES[kind]
    try:
        config = config_class(**_copy(raw))
        with torch.device("meta"):
            model = model_class(config)
        return _view(config, model)
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def _copy(value: Any) -> Any:
    """Transformers changes the mappings that it is given."""
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, list) else value


def _view(config: Any, model: Any) -> dict[str, Any]:
    body = getattr(model, "model", model)
    attention, mlp = body.layers[0].self_attn, body.layers[0].mlp
    head_dim, fused = attention.head_dim, hasattr(attention, "qkv_proj")
    heads = attention.o_proj.in_features // head_dim
    keys = (
        (attention.qkv_proj.out_features - heads * head_dim) // 2 if fused else attention.k_proj.out_features
    )
    first = attention.qkv_proj if fused else attention.q_proj
    rotary = type(body.rotary_emb)(config)
    frequencies = [_frequencies(rotary, length) for length in LENGTHS]
    if heads * head_dim % keys:
        raise ValueError("every key and value serves the same number of queries")
    rotated = 2 * frequencies[0].shape[0]
    if rotated != head_dim and config.model_type != "phi3":
        raise ValueError("cos and sin are multiplied with whole heads")
    sections = getattr(rotary, "mrope_section", None)
    if sections is not None and sum(sections) != head_dim // 2:
        raise ValueError("the angles are split by sections")
    return {
        "vocab_size": body.embed_tokens.num_embeddings,
        "hidden_size": body.embed_tokens.embedding_dim,
        "intermediate_size": mlp.down_proj.in_features,
        "layers": len(body.layers),
        "heads": (heads, keys // head_dim, head_dim),
        "eps": body.norm.variance_epsilon,
        "activation": (mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn)(_ACTIVATED),
        # Of the VL kinds the composite model decides, for which see the families' own tests.
        "tied": config.tie_word_embeddings if hasattr(model, "lm_head") else None,
        "biases": tuple(x.bias is not None for x in (first, attention.o_proj, mlp.down_proj)),
        "normed": hasattr(attention, "q_norm"),
        "windows": _windows(config, body),
        "frequencies": frequencies,
        "attention_factor": float(rotary.attention_scaling),
        "sections": tuple(sections or ()),
    }


def _frequencies(rotary: Any, length: int) -> torch.Tensor:
    """Return the frequencies for a sequence of ``length`` tokens, from a module that has seen none before."""
    positions = torch.arange(length)[None]
    if hasattr(rotary, "mrope_section"):
        positions = positions.expand(3, 1, -1)
    if rotary.rope_type not in ("dynamic", "longrope"):
        return rotary.inv_freq
    fresh = type(rotary)(rotary.config)
    fresh(torch.zeros(1), positions)
    return fresh.inv_freq.clone()


def _windows(config: Any, body: Any) -> tuple[int | None, ...]:
    """Return the window of each layer; None for full attention."""
    if config.model_type in ("llama", "paddleocr_vl_text", "qwen3_vl_text"):
        return (None,) * len(body.layers)
    if config.model_type in ("ministral3", "mistral", "phi3"):
        return (config.sliding_window,) * len(body.layers)
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ValueError("the mask of sliding layers needs a window")
    if set(config.layer_types) - {"full_attention", "sliding_attention"}:
        raise KeyError("there are two masks")
    return tuple(layer.self_attn.sliding_window for layer in body.layers)


def our_view(config: DecoderConfig) -> dict[str, Any]:
    """Return :func:`reference_view` of a configuration of ours."""
    rope = config.rope
    dim = rope.rotary_dim or config.head_dim
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layers": config.num_layers,
        "heads": (config.num_heads, config.num_kv_heads, config.head_dim),
        "eps": config.rms_norm_eps,
        "activation": ACTIVATIONS[config.activation](_ACTIVATED),
        "tied": config.tie_word_embeddings,
        "biases": (config.qkv_bias, config.o_bias, config.mlp_bias),
        "normed": config.qk_norm,
        "windows": tuple(config.window(layer) for layer in range(config.num_layers)),
        "frequencies": [inverse_frequencies(rope, dim, length=length) for length in LENGTHS],
        "attention_factor": rope.attention_factor,
        "sections": rope.mrope_section or (),
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any], context: int) -> list[str]:
    """Names of the entries that differ. A window of ``context`` tokens or more hides nothing."""
    theirs = {**theirs, "windows": tuple(w if w and w < context else None for w in theirs["windows"])}
    return [name for name in theirs if theirs[name] is not None and not _equal(ours[name], theirs[name])]


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return all(map(_equal, ours, theirs))
    if isinstance(theirs, torch.Tensor):
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=2e-6, atol=1e-7)
    if isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-6 * abs(theirs)
    return ours == theirs
