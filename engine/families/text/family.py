"""Language models without images: Cohere 1 and 2, Ernie 4.5, EXAONE 4, Gemma 1 to 4, GLM-4, Granite, Hunyuan,
HyperCLOVA X, LFM2 and 3, Llama, Mistral, Ministral-3, OLMo 2 and 3, Phi3, Qwen2, Qwen3, Qwen3.5, Seed-OSS,
SmolLM3; with experts Cohere 2, Ernie 4.5, Gemma 4, GLM-4.5, Granite-MoE, Mixtral, Qwen2-MoE, Qwen3-MoE,
Qwen3.5-MoE."""

from __future__ import annotations

from engine.checkpoint.rules import (
    DECODER_RULES,
    DEEPSEEK_RULES,
    ERNIE_RULES,
    EXPERT_RULES,
    GEMMA4_RULES,
    GLM_RULES,
    HUNYUAN_RULES,
    HYPERCLOVAX_RULES,
    LFM2_RULES,
    MULTI_TOKEN_HEADS,
    MULTI_TOKEN_LAYERS,
    SANDWICH_RULES,
    WeightRules,
    further_layers,
    unused_keys,
)
from engine.families.base import ModelConfig
from engine.families.family import Family, with_head
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader
from engine.families.retrieval import QWEN3_PAIRS, RetrievalFormat, qwen3_query

_KINDS: dict[str, DecoderKind] = {
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2",
    "Cohere2MoeForCausalLM": "cohere2_moe",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "Exaone4ForCausalLM": "exaone4",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma4ForCausalLM": "gemma4_text",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granitemoe",
    "HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense",
    "HyperCLOVAXForCausalLM": "hyperclovax",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm3ForCausalLM": "lfm3",
    "LlamaForCausalLM": "llama",
    "Ministral3ForCausalLM": "ministral3",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
}

#: Of architectures with names of their own.
_RULES = {
    "Cohere2MoeForCausalLM": DEEPSEEK_RULES,
    "Ernie4_5_MoeForCausalLM": ERNIE_RULES,
    "HunYuanDenseV1ForCausalLM": HUNYUAN_RULES,
    "HyperCLOVAXForCausalLM": HYPERCLOVAX_RULES,
    "Lfm2ForCausalLM": LFM2_RULES,
    "Lfm3ForCausalLM": LFM2_RULES,
}

#: Of architectures whose files may have further tensors.
_UNUSED = {
    "Ernie4_5_MoeForCausalLM": (MULTI_TOKEN_LAYERS,),
    "Qwen3_5ForCausalLM": (MULTI_TOKEN_HEADS,),
    "Qwen3_5MoeForCausalLM": (MULTI_TOKEN_HEADS,),
}


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    names = (name for stated in raw["architectures"] for name in with_head(stated))
    return raw, next(_KINDS[name] for name in names if name in _KINDS)


def _weights(config: ModelConfig) -> WeightRules:
    behind = config.decoder.sandwich or config.decoder.post_norm
    rules = SANDWICH_RULES if behind else DECODER_RULES
    rules = rules if config.decoder.experts is None else EXPERT_RULES
    if config.architecture.startswith("Glm"):
        return WeightRules(language=GLM_RULES, ignore=(further_layers(config.decoder.num_layers),))
    if config.architecture == "Gemma4ForCausalLM":
        return WeightRules(language=GEMMA4_RULES, ignore=unused_keys(config.decoder.borrowing_layers))
    rules = _RULES.get(config.architecture, rules)
    return WeightRules(language=rules, ignore=_UNUSED.get(config.architecture, ()))


def _retrieval(config: ModelConfig) -> RetrievalFormat:
    if config.architecture != "Qwen3ForCausalLM":
        return RetrievalFormat()
    return RetrievalFormat(
        pairs=QWEN3_PAIRS, default_instruction=QWEN3_PAIRS.instruction, write_text=qwen3_query
    )


FAMILY = Family(
    name="text",
    architectures=tuple(_KINDS),
    reader=ConfigReader(text=_text),
    retrieval=_retrieval,
    weights=_weights,
)
