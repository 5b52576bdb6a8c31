"""Language models without images: Llama, Mistral, Qwen2, Qwen3, Phi3."""

from __future__ import annotations

from engine.families.family import Family
from engine.families.parsing.decoder import DecoderKind
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader

_KINDS: dict[str, DecoderKind] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    return raw, next(_KINDS[name] for name in raw["architectures"] if name in _KINDS)


FAMILY = Family(name="text", architectures=tuple(_KINDS), reader=ConfigReader(text=_text))
