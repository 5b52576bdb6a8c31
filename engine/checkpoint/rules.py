"""Rules that give each tensor of a checkpoint its part of the model and its name in that part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from engine.errors import CheckpointError

ModelPart = Literal["language", "vision"]


DECODER_RULES: tuple[tuple[str, str], ...] = (
    (r"(?:model\.|language_model\.)?lm_head\.(.*)", r"lm_head.\1"),
    (r"(?:model\.language_model|language_model\.model|model\.text_model|model)\.(.*)", r"\1"),
)
"""Rules of a decoder: alone, and inside a VLM as Transformers 5 and as earlier versions save it."""

_LAYER = r"(?:.*\.)?(layers\.\d+\.)"
SANDWICH_RULES: tuple[tuple[str, str], ...] = (
    (_LAYER + r"post_attention_layernorm\.(.*)", r"\1attention_out_norm.\2"),
    (_LAYER + r"pre_feedforward_layernorm\.(.*)", r"\1post_attention_layernorm.\2"),
    (_LAYER + r"post_feedforward_layernorm\.(.*)", r"\1mlp_out_norm.\2"),
    *DECODER_RULES,
)
"""Rules of a decoder with norms after attention and MLP as well, or alone, by Gemma's names."""

GEMMA4_RULES: tuple[tuple[str, str], ...] = (
    (_LAYER + r"layer_scalar", r"\1layer_scale"),
    (_LAYER + r"router\.proj\.weight", r"\1mlp.router.weight"),
    (_LAYER + r"router\.scale", r"\1mlp.router.scale"),
    (_LAYER + r"router\.per_expert_scale", r"\1mlp.router.factors"),
    (_LAYER + r"experts\.(.*)", r"\1mlp.experts.\2"),
    (_LAYER + r"post_feedforward_layernorm_1\.(.*)", r"\1mlp.mlp_norm.\2"),
    (_LAYER + r"pre_feedforward_layernorm_2\.(.*)", r"\1mlp.experts_in_norm.\2"),
    (_LAYER + r"post_feedforward_layernorm_2\.(.*)", r"\1mlp.experts_norm.\2"),
    (_LAYER + r"per_layer_input_gate\.(.*)", r"\1layer_input.gate.\2"),
    (_LAYER + r"per_layer_projection\.(.*)", r"\1layer_input.projection.\2"),
    (_LAYER + r"post_per_layer_input_norm\.(.*)", r"\1layer_input.norm.\2"),
    (r"(?:.*\.)?embed_tokens_per_layer\.(.*)", r"layer_inputs.embedding.\1"),
    (r"(?:.*\.)?per_layer_model_projection\.(.*)", r"layer_inputs.projection.\1"),
    (r"(?:.*\.)?per_layer_projection_norm\.(.*)", r"layer_inputs.norm.\1"),
    *SANDWICH_RULES,
)
"""Rules of a decoder by Gemma 4's names."""

MULTI_TOKEN_HEADS = r"mtp\..*"
"""Qwen3.5's layers that predict further tokens, which Transformers leaves out too."""


def further_layers(layers: int) -> str:
    """GLM's layer behind the ``layers`` of the model. It predicts a further token; Transformers drops it."""
    return rf"(?:.*\.)?layers\.{layers}\..*"


def unused_keys(layers: Iterable[int]) -> tuple[str, ...]:
    """Names of the keys and values, which files may have, of a decoder's ``layers`` that borrow those of
    another one."""
    numbers = "|".join(map(str, layers))
    return (
        (rf"(?:(?:model|language_model)\.)*layers\.(?:{numbers})\.self_attn\.[kv]_(?:proj|norm)\..*",)
        if numbers
        else ()
    )


_EXPERTS = _LAYER + r"block_sparse_moe\."
EXPERT_RULES: tuple[tuple[str, str], ...] = (
    (_EXPERTS + r"experts\.(\d+)\.w1\.(.*)", r"\1mlp.experts.\2.gate_proj.\3"),
    (_EXPERTS + r"experts\.(\d+)\.w2\.(.*)", r"\1mlp.experts.\2.down_proj.\3"),
    (_EXPERTS + r"experts\.(\d+)\.w3\.(.*)", r"\1mlp.experts.\2.up_proj.\3"),
    (_EXPERTS + r"input_linear\.weight", r"\1mlp.experts.gate_up_proj"),
    (_EXPERTS + r"output_linear\.weight", r"\1mlp.experts.down_proj"),
    (_EXPERTS + r"router\.(?:layer\.)?weight", r"\1mlp.gate.weight"),
    (_EXPERTS + r"(.*)", r"\1mlp.\2"),
    *DECODER_RULES,
)
"""Rules of a decoder with experts, by the names of Mixtral, Granite and Qwen."""

_MLP = r"(?:.*\.)?(layers\.\d+\.mlp\.)"
DEEPSEEK_RULES: tuple[tuple[str, str], ...] = (
    (_MLP + r"shared_experts\.(.*)", r"\1shared_expert.\2"),
    *DECODER_RULES,
)
"""Rules of a decoder with experts by DeepSeek's names."""

ERNIE_RULES: tuple[tuple[str, str], ...] = (
    (_MLP + r"moe_statics\.(e_score_correction_bias)", r"\1gate.\2"),
    *DEEPSEEK_RULES,
)
"""Rules of a decoder with experts by Ernie's names."""

MULTI_TOKEN_LAYERS = r".*\bmtp_.*"
"""Ernie's layers that predict further tokens, which Transformers leaves out too."""


def ernie_vl_rules(experts: int) -> tuple[tuple[str, str], ...]:
    """Rules of a decoder whose experts of images and videos are counted on from the ``experts`` of text."""
    numbers = "|".join(str(number) for number in range(experts, 2 * experts))
    return (
        (_MLP + r"gate\.weight_1", r"\1vision.gate.weight"),
        (_MLP + rf"(experts\.(?:{numbers})\..*)", r"\1vision.\2"),
        *ERNIE_RULES,
    )


GLM_RULES: tuple[tuple[str, str], ...] = (
    (_LAYER + r"post_self_attn_layernorm\.(.*)", r"\1attention_out_norm.\2"),
    (_LAYER + r"post_mlp_layernorm\.(.*)", r"\1mlp_out_norm.\2"),
    *DEEPSEEK_RULES,
)
"""Rules of a decoder by GLM's names: some have norms after attention and MLP as well, some have experts."""

LFM2_RULES: tuple[tuple[str, str], ...] = (
    (_LAYER + r"operator_norm\.(.*)", r"\1input_layernorm.\2"),
    (_LAYER + r"post_operator_norm\.(.*)", r"\1attention_out_norm.\2"),
    (_LAYER + r"post_ffn_norm\.(.*)", r"\1mlp_out_norm.\2"),
    (r"(?:.*\.)?(layers\.\d+\.self_attn\.)gate_proj\.(.*)", r"\1g_proj.\2"),
    (_LAYER + r"ffn_norm\.(.*)", r"\1post_attention_layernorm.\2"),
    (r"(?:.*\.)?(layers\.\d+\.self_attn\.)out_proj\.(.*)", r"\1o_proj.\2"),
    (r"(?:.*\.)?(layers\.\d+\.self_attn\.[qk]_)layernorm\.(.*)", r"\1norm.\2"),
    (_LAYER + r"conv\.(.*)", r"\1short_conv.\2"),
    (_LAYER + r"feed_forward\.w1\.(.*)", r"\1mlp.gate_proj.\2"),
    (_LAYER + r"feed_forward\.w2\.(.*)", r"\1mlp.down_proj.\2"),
    (_LAYER + r"feed_forward\.w3\.(.*)", r"\1mlp.up_proj.\2"),
    (r"(?:.*\.)?embedding_norm\.(.*)", r"norm.\1"),
    *DECODER_RULES,
)
"""Rules of a decoder by the names of LFM2 and LFM3."""

HUNYUAN_RULES: tuple[tuple[str, str], ...] = (
    (r"(?:.*\.)?(layers\.\d+\.self_attn\.)query_layernorm\.(.*)", r"\1q_norm.\2"),
    (r"(?:.*\.)?(layers\.\d+\.self_attn\.)key_layernorm\.(.*)", r"\1k_norm.\2"),
    *DECODER_RULES,
)
"""Rules of a decoder by Hunyuan's names."""

HYPERCLOVAX_RULES: tuple[tuple[str, str], ...] = (
    (_LAYER + r"post_norm1\.(.*)", r"\1attention_out_norm.\2"),
    (_LAYER + r"post_norm2\.(.*)", r"\1mlp_out_norm.\2"),
    (r"model\.language_model\.lm_head\.(.*)", r"lm_head.\1"),
    (r"model\.language_model\.model\.(.*)", r"\1"),
    *DECODER_RULES,
)
"""Rules of a decoder by HyperCLOVA X's names."""

_MOLMO2_BLOCK = r"model\.transformer\.blocks\.(\d+)\."
MOLMO2_RULES: tuple[tuple[str, str], ...] = (
    (r"model\.transformer\.wte\.embedding", "embed_tokens.weight"),
    (r"model\.transformer\.wte\.new_embedding", "embed_tokens.further"),
    (r"model\.transformer\.ln_f\.(.*)", r"norm.\1"),
    (_MOLMO2_BLOCK + r"attn_norm\.(.*)", r"layers.\1.input_layernorm.\2"),
    (_MOLMO2_BLOCK + r"ff_norm\.(.*)", r"layers.\1.post_attention_layernorm.\2"),
    (_MOLMO2_BLOCK + r"self_attn\.att_proj\.(.*)", r"layers.\1.self_attn.qkv_proj.\2"),
    (_MOLMO2_BLOCK + r"self_attn\.attn_out\.(.*)", r"layers.\1.self_attn.o_proj.\2"),
    (_MOLMO2_BLOCK + r"self_attn\.([qk]_norm\..*)", r"layers.\1.self_attn.\2"),
    (_MOLMO2_BLOCK + r"mlp\.ff_proj\.(.*)", r"layers.\1.mlp.up_gate_proj.\2"),
    (_MOLMO2_BLOCK + r"mlp\.ff_out\.(.*)", r"layers.\1.mlp.down_proj.\2"),
    *DECODER_RULES,
)
"""Rules of a decoder by Molmo 2's names."""

MOLMO2_POST_RULES: tuple[tuple[str, str], ...] = (
    (_MOLMO2_BLOCK + r"attn_norm\.(.*)", r"layers.\1.attention_out_norm.\2"),
    (_MOLMO2_BLOCK + r"ff_norm\.(.*)", r"layers.\1.mlp_out_norm.\2"),
    (_LAYER + r"input_layernorm\.(.*)", r"\1attention_out_norm.\2"),
    (_LAYER + r"post_attention_layernorm\.(.*)", r"\1mlp_out_norm.\2"),
    *MOLMO2_RULES,
)
"""The same of one whose norms come behind attention and MLP."""

_WITH_HEAD = "model."
ROTARY_BUFFERS = r".*rotary_emb\.inv_freq"
TIED_HEAD = r".*lm_head\.weight"


@dataclass(frozen=True, slots=True)
class WeightRules:
    """Rename rules. A rule is a regular expression for a whole tensor name, and the name in the part's module
    with groups as ``\\1``. The first match counts: ``ignore`` before ``vision`` before ``language``.

    Attributes:
        language, vision: the rules of the decoder and of the vision part.
        ignore: expressions for tensors that may be in a file and aren't loaded, e.g. rotary buffers.
    """

    language: tuple[tuple[str, str], ...] = DECODER_RULES
    vision: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()

    def assign(self, names: Iterable[str]) -> Mapping[ModelPart, Mapping[str, str]]:
        """The checkpoint's tensors of each part: name in the part's module to name in the checkpoint.

        Where no name begins with ``model.``, one that matches no rule is tried with it: the model may have
        been saved without its head, as Qwen3-Embedding was.

        Raises:
            CheckpointError: no rule matches a name, or two names are those of one tensor.
        """
        return _assign(self, tuple(names))


# Each stage of a load asks for the same names, which are tens of thousands in models with many experts.
@lru_cache(maxsize=4)
def _assign(rules: WeightRules, names: tuple[str, ...]) -> Mapping[ModelPart, Mapping[str, str]]:
    parts: dict[ModelPart, dict[str, str]] = {"language": {}, "vision": {}}
    unknown = []
    headless = not any(name.startswith(_WITH_HEAD) for name in names)
    for name in names:
        if any(re.fullmatch(pattern, name) for pattern in rules.ignore):
            continue
        found = _find(rules, name) or (_find(rules, _WITH_HEAD + name) if headless else None)
        if found is None:
            unknown.append(name)
            continue
        part, internal = found
        if internal in parts[part]:
            raise CheckpointError(f"tensors {parts[part][internal]} and {name} are the same weight")
        parts[part][internal] = name
    if unknown:
        raise CheckpointError(f"tensors that this model doesn't have: {listing(unknown)}")
    return MappingProxyType({part: MappingProxyType(found) for part, found in parts.items()})


def _find(rules: WeightRules, name: str) -> tuple[ModelPart, str] | None:
    tables: tuple[tuple[ModelPart, tuple[tuple[str, str], ...]], ...] = (
        ("vision", rules.vision),
        ("language", rules.language),
    )
    for part, table in tables:
        for pattern, replacement in table:
            match = re.fullmatch(pattern, name)
            if match:
                return part, match.expand(replacement)
    return None


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first ``limit`` names in alphabetical order, and the number of the others."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:limit])
    return shown + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
