"""Draws PaliGemma and PaliGemma 2 checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.families.drawn.checkpoint import (
    Drawn,
    Unavailable,
    draw_ends,
    place_tied,
    same_weights,
    write_json,
    write_model,
)
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.gemma3 import draw_gemma2_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import lengths_from_one, lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_tower, hub_name
from tests.engine.families.paligemma import FRAME, SPECIALS, PaliGemmaReference, paligemma_tokenizer
from tests.engine.tiny import TRANSFORMERS

_TOKENS = 512


@dataclass(frozen=True)
class PaliGemmaFamily:
    """SigLIP before a decoder of ``kind``, ``gemma`` or ``gemma2``; all of a prompt attends both ways."""

    kind: str

    @property
    def name(self) -> str:
        return "paligemma" if self.kind == "gemma" else "paligemma2"

    architectures = ("PaliGemmaForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        if TRANSFORMERS < (5, 23):
            raise Unavailable("compared with later releases alone")
        tok = paligemma_tokenizer()
        tok.save_pretrained(path)
        if self.kind == "gemma":
            text = draw_decoder(draw, "gemma", len(tok), tokens=_TOKENS)
        else:
            text = draw_gemma2_decoder(draw, len(tok))
            # A longer prompt is refused.
            text["sliding_window"] = max(text["sliding_window"], _TOKENS)
        text["model_type"] = self.kind
        patch, per_side = draw.choice("patch", (4, 6, 7)), draw.integer("patches per side", 1, 5)
        side = patch * per_side + draw.variant("pixels without a patch", (0, 1, patch - 1), 0.2)
        tower = draw_tower(draw, side=side, patch=patch)
        raw: dict[str, Any] = {
            "model_type": "paligemma",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": {**tower, "model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_index": SPECIALS.index("<image>"),
            "projection_dim": text["hidden_size"],
            "hidden_size": text["hidden_size"],
        }
        place_tied(draw, raw, text)
        (architecture,) = self.architectures
        model = write_model(
            draw,
            path,
            raw,
            architecture,
            hub_name if draw.varies("hub names", 0.5) else None,
            most_embedding=0.1,
        )
        draw_ends(draw, path, text, 1, 0)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        write_json(
            path / "preprocessor_config.json",
            {
                "image_processor_type": "SiglipImageProcessor",
                "size": {"height": side, "width": side},
                "image_seq_length": per_side**2,
                **draw_pixels(draw),
            },
        )
        return Drawn(
            path,
            same_weights(PaliGemmaReference(path, per_side**2), model),
            Style(FRAME, placeholder=lambda index, count: "<image>", longest=20.0),
            _TOKENS,
            {},
            frozenset({raw["image_token_index"]}),
            lengths_from_one(lengths_of(self.kind, text)),
            together=_TOKENS,
        )
