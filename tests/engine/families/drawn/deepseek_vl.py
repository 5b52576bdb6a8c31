"""Draws DeepSeek-VL checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families.deepseek_vl import (
    FRAME,
    IMAGE,
    SPECIALS,
    DeepseekVLReference,
    deepseek_vl_tokenizer,
)
from tests.engine.families.drawn.checkpoint import (
    Drawn,
    draw_ends,
    same_weights,
    write_json,
    write_model,
)
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import nested_lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_tower, hub_name

_TOKENS = 512
_ARCHITECTURE = "DeepseekVLForConditionalGeneration"


class DeepseekVLFamily:
    """A SigLIP tower of any side, and a Llama."""

    name = "deepseek_vl"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = deepseek_vl_tokenizer()
        tok.save_pretrained(path)
        text = draw_decoder(draw, "llama", len(tok), tokens=_TOKENS)
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "model_type": "llama"}
        patch, per_side = draw.choice("patch", (4, 6, 7)), draw.integer("patches per side", 1, 5)
        side = patch * per_side
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": {
                **draw_tower(draw, side=side, patch=patch),
                "model_type": "siglip_vision_model",
            },
            "image_token_id": SPECIALS.index(IMAGE),
        }
        if draw.varies("tied stated outside", 0.7):
            raw["tie_word_embeddings"] = draw.choice("tied outside", (True, False))
        renamed = hub_name if draw.varies("hub names", 0.5) else None
        model = write_model(draw, path, raw, _ARCHITECTURE, renamed)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        pixels = draw_pixels(draw)
        if draw.varies("least side", 0.6):
            pixels["min_size"] = draw.integer("least", 1, side)
        else:
            pixels["min_size"] = min(14, side)
        processor = {"image_processor_type": "DeepseekVLImageProcessor", **pixels}
        write_json(path / "preprocessor_config.json", {**processor, "size": {"height": side, "width": side}})
        return Drawn(
            path,
            same_weights(DeepseekVLReference(path, per_side**2), model),
            Style(FRAME, "<eos>", placeholder=lambda index, count: IMAGE, longest=20.0),
            _TOKENS,
            media=frozenset({raw["image_token_id"]}),
            lengths=nested_lengths_of("llama", text),
        )
