"""Draws Idefics3 and SmolVLM checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

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
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_tower
from tests.engine.families.idefics import SPECIALS, IdeficsReference
from tests.engine.tiny import tokenizer

_MORE = tuple(f"<row_{row}_col_{column}>" for row in range(1, 8) for column in range(1, 8))


@dataclass(frozen=True)
class IdeficsFamily:
    """One of the two; ``kind`` is the beginning of its class names in Transformers."""

    kind: str

    @property
    def name(self) -> str:
        return self.kind.lower()

    @property
    def architectures(self) -> tuple[str, ...]:
        return (f"{self.kind}ForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        try:
            getattr(transformers, f"{self.kind}ImageProcessorPil")()
        except ImportError as error:
            raise Unavailable("this release of Transformers needs torchvision for the family") from error
        specials = tuple(dict.fromkeys((*SPECIALS, *_MORE)))
        tok = tokenizer(specials, vocab_size=400, bos_token="<|im_start|>", eos_token="<end_of_utterance>")
        if draw.varies("two line feeds are a token", 0.5):
            tok.add_tokens(["\n\n"])
        tok.save_pretrained(path)
        text = draw_decoder(draw, "llama", len(tok), tokens=1024)
        text |= {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        factor = draw.choice("scale factor", (2, 3, 4, 5))
        patch = draw.choice("patch", (4, 6, 7))
        side = patch * factor * draw.choice("rows per side", (1, 2, 3) if factor < 4 else (1, 2))
        side += draw.variant("pixels without a patch", (0, patch - 1, 1), 0.3)
        tower = draw_tower(draw, side=side, patch=patch)
        image = SPECIALS.index("<image>")
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "image_token_id": image,
            "scale_factor": factor,
            "pad_token_id": 0,
        }
        tied = text.pop("tie_word_embeddings", None)
        if tied is not None:
            raw["tie_word_embeddings"] = tied
        if draw.varies("fields of granite-docling", 0.2):
            # Nothing reads them.
            text |= {"is_llama_config": True, "pixel_shuffle_factor": factor, "qk_layer_norms": False}
            text["architectures"] = ["VLlama3ForCausalLM"]
            tower |= {"max_image_size": {"longest_edge": side}, "use_base_siglip": True}
        (architecture,) = self.architectures
        model = write_model(draw, path, raw, architecture)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        stated = {
            "image_processor_type": f"{self.kind}ImageProcessor",
            "size": {"longest_edge": side * draw.choice("longest edge in crops", (1, 2, 3))},
            "max_image_size": {"longest_edge": side},
            **draw_pixels(draw),
        }
        kwargs: dict[str, Any] = {}
        if draw.varies("no splitting", 0.2):
            stated["do_image_splitting"] = False
        if draw.varies("splitting by option", 0.2):
            kwargs["do_image_splitting"] = draw.choice("splitting", (True, False))
        if draw.varies("size by option", 0.2):
            kwargs["size"] = {"longest_edge": side * draw.choice("longest edge of the option", (1, 2))}
        write_json(path / "preprocessor_config.json", stated)
        style = Style(
            "<|im_start|>User:{}<end_of_utterance>\nAssistant:",
            "<end_of_utterance>\n",
            placeholder=lambda index, count: "<image>",
            longest=6.0,
            several=3,
        )
        lengths = lengths_of("llama", text)
        media = frozenset({image})
        reference = same_weights(IdeficsReference(path, self.kind, **kwargs), model)
        return Drawn(path, reference, style, 1024, {"mm_processor_kwargs": kwargs}, media, lengths)
