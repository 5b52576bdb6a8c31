"""Draws text-only checkpoints: Llama, Mistral, Mixtral, Phi-3, Qwen2, Qwen3, and Qwens with experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import processors

from tests.engine.families.drawn.checkpoint import Drawn, draw_ends, same_weights, write_json, write_model
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder, lengths_of
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.references import TextReference
from tests.engine.tiny import tokenizer

_TOKENS = 224


@dataclass(frozen=True)
class TextFamily:
    """One architecture of text models; ``kind`` is its ``model_type``."""

    kind: str

    @property
    def name(self) -> str:
        return self.kind

    @property
    def architecture(self) -> str:
        return "".join(word.capitalize() for word in self.kind.split("_")) + "ForCausalLM"

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = tokenizer(
            ["<pad>", "<s>", "</s>", "<end>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        if draw.varies("bos before prompts", 0.3):
            tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        tok.save_pretrained(path)
        fields = draw_decoder(draw, self.kind, len(tok), tokens=_TOKENS)
        raw: dict[str, Any] = {"model_type": self.kind, "torch_dtype": "float32", **fields}
        if self.kind == "phi3":
            raw["pad_token_id"] = 0
        model = write_model(draw, path, raw, self.architecture)
        draw_ends(draw, path, raw, 2, 3)
        write_json(path / "config.json", {"architectures": [self.architecture], **raw})
        words = 30 if draw.varies("short prompts", 0.3) else 70
        style = Style("{}", "", words=words)
        return Drawn(
            path,
            same_weights(TextReference(path), model),
            style,
            _TOKENS,
            lengths=lengths_of(self.kind, fields),
        )
