"""Draws DeepSeek-OCR 2 checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families.deepseek_ocr2 import (
    FRAME,
    PUBLISHED,
    SPECIALS,
    DeepseekReference,
    as_published,
    deepseek_tokenizer,
)
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
from tests.engine.families.drawn.got_ocr2 import draw_sam
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import nested_lengths_of
from tests.engine.families.drawn.vision import draw_pixels

#: Two images with three squares each.
_TOKENS = 1536
_ARCHITECTURE = "DeepseekOcr2ForConditionalGeneration"


class DeepseekFamily:
    """DeepSeek-OCR 2: a SAM tower, a second encoder of any heads, and experts behind dense layers."""

    name = "deepseek_ocr2"
    architectures = (_ARCHITECTURE, PUBLISHED)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = deepseek_tokenizer()
        tok.save_pretrained(path)
        text = draw_decoder(draw, self.name, len(tok), tokens=_TOKENS)
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        # The class has a fixed number of queries, for squares of so many patches.
        patch = draw.choice("patch", (1, 2))
        tile, whole = 48 * patch, 64 * patch
        width = draw.choice("encoder heads", (1, 2, 4)) * 16
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": {
                "sam_config": _sam(draw, whole, patch, width),
                "encoder_config": _encoder(draw, width),
            },
            "image_token_id": SPECIALS.index("<image>"),
        }
        place_tied(draw, raw, text)
        model = write_model(draw, path, raw, _ARCHITECTURE)
        draw_ends(draw, path, text, 2, 1)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        stated: dict[str, Any] = {
            "size": {"height": whole, "width": whole},
            "tile_size": tile,
            **draw_pixels(draw),
        }
        if draw.varies("background", 0.3):
            stated["background_color"] = [3, 200, 90]
        write_json(path / "preprocessor_config.json", stated)
        kinds = text["mlp_layer_types"]
        # The publisher states how many layers have no experts, and has a rotary base of its own.
        publishable = kinds == sorted(kinds) and "rope_theta" in raw["vision_config"]["encoder_config"]
        if publishable and draw.varies("publisher's names", 0.8):
            as_published(path)
        kwargs = {"max_patches": draw.choice("most tiles", (1, 2))}
        return Drawn(
            path,
            same_weights(DeepseekReference(path, **kwargs), model),
            Style(
                FRAME,
                "<eos>",
                placeholder=lambda index, count: "<image>\n",
                area=tile**2,
                longest=8.0,
                several=2,
            ),
            _TOKENS,
            {"mm_processor_kwargs": kwargs},
            media=frozenset({SPECIALS.index("<image>")}),
            lengths=nested_lengths_of(self.name, text),
        )


def _sam(draw: Draw, side: int, patch: int, width: int) -> dict[str, Any]:
    """Fields of the tower, of few and small layers: its squares have thousands of patches."""
    tower = draw_sam(draw, side=side, patch=patch)
    heads = draw.choice("heads of a small tower", (1, 2))
    return tower | {
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "global_attn_indexes": draw.variant("whole layers", ([], [1]), 0.3),
        "window_size": draw.integer("small window", 3, 8),
        "downsample_channels": [draw.choice("halved", (8, 12)), width],
    }


def _encoder(draw: Draw, width: int) -> dict[str, Any]:
    heads = draw.choice("second encoder's heads", (1, 2, 4))
    found: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": draw.choice("second encoder's MLP", (24, 48)),
        "num_hidden_layers": draw.integer("second encoder's layers", 1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice(
            "second encoder's KV heads", [n for n in (1, 2, 4) if heads % n == 0]
        ),
    }
    if draw.varies("second encoder's norm", 0.3):
        found["rms_norm_eps"] = 1e-3
    if draw.varies("second encoder's base", 0.4):
        found |= draw.choice(
            "base spelled",
            ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 2000.0}}),
        )
    return found
