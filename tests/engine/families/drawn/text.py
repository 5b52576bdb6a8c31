"""Draws text-only checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import processors

from tests.engine.families.drawn.checkpoint import (
    Drawn,
    Unavailable,
    draw_ends,
    same_weights,
    write_json,
    write_model,
)
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.gemma3 import draw_gemma2_decoder, draw_gemma3_decoder
from tests.engine.families.drawn.gemma4 import draw_gemma4_decoder
from tests.engine.families.drawn.lfm2 import draw_lfm3_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import lengths_of
from tests.engine.families.references import TextReference
from tests.engine.tiny import tokenizer

_TOKENS = 224
#: The architecture of each ``model_type``.
ARCHITECTURES = {
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "cohere2_moe": "Cohere2MoeForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "hyperclovax": "HyperCLOVAXForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm3": "Lfm3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


@dataclass(frozen=True)
class TextFamily:
    """One architecture of text models; ``kind`` is its ``model_type``."""

    kind: str

    @property
    def name(self) -> str:
        return self.kind

    @property
    def architectures(self) -> tuple[str, ...]:
        return (ARCHITECTURES[self.kind],)

    def make(self, draw: Draw, path: Path) -> Drawn:
        if not hasattr(transformers, ARCHITECTURES[self.kind]):
            raise Unavailable(f"this release of Transformers has no {self.kind}")
        tok = tokenizer(
            ["<pad>", "<s>", "</s>", "<end>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        if draw.varies("bos before prompts", 0.3):
            tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        tok.save_pretrained(path)
        fields = self._decoder(draw, len(tok))
        (architecture,) = self.architectures
        raw: dict[str, Any] = {"torch_dtype": "float32", **fields, "model_type": self.kind}
        if self.kind in ("glm", "glm4", "lfm3", "phi3", "smollm3", *_QWEN3_5):
            raw["pad_token_id"] = 0
        model = write_model(draw, path, raw, architecture, most_embedding=_MOST_EMBEDDING.get(self.kind, 1.0))
        draw_ends(draw, path, raw, 2, 3)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        words = 30 if draw.varies("short prompts", 0.3) else 70
        style = Style("{}", "", words=words)
        return Drawn(
            path,
            same_weights(TextReference(path), model),
            style,
            _TOKENS,
            lengths=lengths_of(self.kind, fields),
        )

    def _decoder(self, draw: Draw, vocab: int) -> dict[str, Any]:
        if self.kind == "gemma2":
            return draw_gemma2_decoder(draw, vocab)
        if self.kind == "gemma3_text":
            return draw_gemma3_decoder(draw, vocab, rows=0)
        if self.kind == "gemma4_text":
            return draw_gemma4_decoder(draw, vocab)
        if self.kind == "lfm3":
            return draw_lfm3_decoder(draw, vocab, tokens=_TOKENS)
        if self.kind in _QWEN3_5:
            return draw_decoder(draw, self.kind.removesuffix("_text"), vocab, tokens=_TOKENS, section=True)
        return draw_decoder(draw, self.kind, vocab, tokens=_TOKENS)


_QWEN3_5 = ("qwen3_5_moe_text", "qwen3_5_text")

#: Embeddings that are multiplied must be smaller, or they would hide what the layers add.
_MOST_EMBEDDING = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma4_text"), 0.1),
    **dict.fromkeys(("granite", "granitemoe", "hyperclovax"), 0.3),
}
