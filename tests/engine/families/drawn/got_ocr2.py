"""Draws GOT-OCR 2 checkpoints, and the SAM towers of other families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families.drawn.checkpoint import (
    Drawn,
    draw_ends,
    place_tied,
    same_weights,
    write_json,
    write_model,
)
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import nested_lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_sizes
from tests.engine.families.got_ocr2 import FRAME, IMAGE, SPECIALS, GotReference
from tests.engine.tiny import tokenizer

_TOKENS = 512
_ARCHITECTURE = "GotOcr2ForConditionalGeneration"


class GotFamily:
    """GOT-OCR 2: a SAM tower of any side, windows and tables, and Qwen2."""

    name = "got_ocr2"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        tok.save_pretrained(path)
        text = draw_decoder(draw, "qwen2", len(tok), tokens=_TOKENS)
        text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        if draw.varies("text model stated", 0.7):
            text["model_type"] = "qwen2"
        patch = draw.choice("patch", (4, 6, 7))
        per_side = draw.integer("patches per side", 2, 11)
        tower = draw_sam(draw, side=patch * per_side, patch=patch)
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            draw.variant("image token's field", ("image_token_index", "image_token_id"), 0.3): SPECIALS.index(
                "<imgpad>"
            ),
        }
        place_tied(draw, raw, text)
        model = write_model(draw, path, raw, _ARCHITECTURE)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        side = tower["image_size"]
        write_json(
            path / "preprocessor_config.json", {"size": {"height": side, "width": side}, **draw_pixels(draw)}
        )
        kwargs: dict[str, Any] = {}
        if draw.varies("tiling by option", 0.4):
            kwargs["crop_to_patches"] = True
            if draw.varies("tiles by option", 0.5):
                kwargs["max_patches"] = draw.choice("tiles of the option", (1, 3, 5))
        rows = (-(-per_side // 4)) ** 2
        return Drawn(
            path,
            same_weights(GotReference(path, num_image_tokens=rows, **kwargs), model),
            Style(
                FRAME, "<|im_end|>", placeholder=lambda index, count: IMAGE, area=4 * side**2, longest=20.0
            ),
            _TOKENS,
            {"mm_processor_kwargs": kwargs},
            media=frozenset({SPECIALS.index("<imgpad>")}),
            lengths=nested_lengths_of("qwen2", text),
        )


def draw_sam(draw: Draw, *, side: int, patch: int) -> dict[str, Any]:
    """Fields of a SAM tower for images of ``side`` pixels with patches of ``patch``."""
    tower = draw_sizes(draw, side=side, patch=patch)
    tower["mlp_dim"] = tower.pop("intermediate_size")
    layers = tower["num_hidden_layers"]
    tower |= {
        "output_channels": draw.choice("neck", (8, 16, 20)),
        "window_size": draw.integer("window", 1, 6),
        "global_attn_indexes": [layer for layer in range(layers) if draw.varies(f"layer {layer} whole", 0.4)],
        "qkv_bias": draw.variant("tower bias", (True, False), 0.3),
        "use_abs_pos": draw.variant("tower positions", (True, False), 0.2),
        "use_rel_pos": draw.variant("tower distances", (True, False), 0.2),
        "hidden_act": draw.variant("tower activation", ("gelu", "gelu_pytorch_tanh", "relu"), 0.3),
        "layer_norm_eps": draw.variant("tower norm eps", (1e-6, 1e-3), 0.3),
    }
    usual = {"qkv_bias": True, "use_abs_pos": True, "use_rel_pos": True, "hidden_act": "gelu"}
    for field, value in {**usual, "layer_norm_eps": 1e-6}.items():
        if tower[field] == value:
            draw.spelled(tower, field)
    return tower
