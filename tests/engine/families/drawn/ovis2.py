"""Draws Ovis2 checkpoints."""

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
from tests.engine.families.ovis2 import SPECIALS, TOKENS, Ovis2Reference
from tests.engine.families.qwen import FRAME
from tests.engine.tiny import tokenizer

_TOKENS = 1024
_ARCHITECTURE = "Ovis2ForConditionalGeneration"


class Ovis2Family:
    """Ovis2: an AIMv2 tower, a visual vocabulary, tiles by either rule, and Qwen2 or its like."""

    name = "ovis2"
    architectures = (_ARCHITECTURE,)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        tok.save_pretrained(path)
        kind = draw.variant("text model", ("qwen2", "qwen3", "llama"), 0.5)
        text = draw_decoder(draw, kind, len(tok), tokens=_TOKENS)
        text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        if kind != "qwen2" or draw.varies("text model stated", 0.7):
            text["model_type"] = kind
        tower = _tower(draw)
        raw: dict[str, Any] = {
            "model_type": "ovis2",
            "torch_dtype": "float32",
            "text_config": text,
            "vision_config": tower,
            "vocab_size": text["vocab_size"],
            "hidden_size": text["hidden_size"],
            **TOKENS,
        }
        place_tied(draw, raw, text)
        model = write_model(draw, path, raw, _ARCHITECTURE)
        draw_ends(draw, path, text, 2, 0)
        write_json(path / "config.json", {"architectures": [_ARCHITECTURE], **raw})
        _processor(draw, path, tower["image_size"])
        kwargs: dict[str, Any] = {}
        if draw.varies("tiles by option", 0.2):
            kwargs["max_patches"] = draw.choice("tiles of the option", (1, 3, 5))
        if draw.varies("tiling by option", 0.15):
            kwargs["crop_to_patches"] = draw.choice("tiling of the option", (True, False))
        return Drawn(
            path,
            same_weights(Ovis2Reference(path, **kwargs), model),
            Style(
                FRAME,
                "<|im_end|>\n",
                placeholder=lambda index, count: "<image>\n",
                area=4 * tower["image_size"] ** 2,
                longest=20.0,
            ),
            _TOKENS,
            {"mm_processor_kwargs": kwargs},
            media=frozenset({TOKENS["image_token_id"], *TOKENS["visual_indicator_token_ids"]}),
            lengths=nested_lengths_of(kind, text),
        )


def _tower(draw: Draw) -> dict[str, Any]:
    """``vision_config``, whose ``hidden_stride`` divides the tower's patches."""
    patch, stride = draw.choice("patch", (4, 6, 7)), draw.choice("squares' side", (2, 2, 1, 4))
    per_side = stride * draw.choice("rows per side", (1, 2, 3) if stride < 4 else (1, 2))
    side = patch * per_side + draw.variant("pixels without a patch", (0, 1, patch - 1), 0.2)
    tower = draw_sizes(draw, side=side, patch=patch) | {
        "hidden_stride": stride,
        "vocab_size": draw.integer("visual words", 12, 60),
        "qkv_bias": draw.variant("tower bias", (False, True), 0.3),
        "mlp_bias": draw.variant("tower MLP bias", (False, True), 0.3),
        "rms_norm_eps": draw.variant("tower norm eps", (1e-5, 1e-3), 0.3),
        "hidden_act": draw.variant("tower activation", ("silu", "gelu", "gelu_pytorch_tanh"), 0.3),
    }
    plain = {
        "hidden_stride": 1,
        "qkv_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    for field, value in plain.items():
        if tower[field] == value:
            draw.spelled(tower, field)
    return tower


def _processor(draw: Draw, path: Path, side: int) -> None:
    """preprocessor_config.json, whose squares are the tower's."""
    least = draw.variant("least tiles", (1, 2, 3), 0.2)
    stated: dict[str, Any] = {
        "image_processor_type": "Ovis2ImageProcessor",
        "size": {"height": side, "width": side},
        "crop_to_patches": draw.variant("whole images", (True, False), 0.15),
        "min_patches": least,
        "max_patches": max(least, draw.choice("most tiles", (12, 9, 4, 1))),
        "use_covering_area_grid": draw.variant("tiles by aspect ratio", (True, False), 0.3),
        **draw_pixels(draw),
    }
    for field, value in (("min_patches", 1), ("max_patches", 12), ("use_covering_area_grid", True)):
        if stated[field] == value:
            draw.spelled(stated, field)
    write_json(path / "preprocessor_config.json", stated)
