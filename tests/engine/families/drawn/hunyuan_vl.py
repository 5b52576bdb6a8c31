"""Draws HunyuanOCR checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families.drawn.checkpoint import Drawn, draw_ends, same_weights, write_json, write_model
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.vision import draw_pixels, draw_sizes
from tests.engine.families.hunyuan_vl import (
    FRAME,
    IMAGE,
    SPECIALS,
    TOKENS,
    HunyuanReference,
    hunyuan_tokenizer,
)

_TOKENS = 512


class HunyuanFamily:
    """A ViT for images of any size, and a decoder with positions on three or four axes."""

    name = "hunyuan_vl"
    architectures = ("HunYuanVLForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = hunyuan_tokenizer()
        tok.save_pretrained(path)
        text = draw_decoder(draw, self.name, len(tok), tokens=_TOKENS, section=True)
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if draw.varies("older names", 0.4):
            text["attention_head_dim"] = text.pop("head_dim")
            text["org_vocab_size"] = text["vocab_size"]
        patch, merge = draw.choice("patch", (4, 6, 7)), draw.choice("merge", (2, 2, 2, 3))
        tower = _tower(draw, patch, merge)
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "vision_config": tower,
            "image_token_id": SPECIALS.index(TOKENS["image_token"]),
            "im_start_id": SPECIALS.index(TOKENS["image_start_token"]),
            "im_end_id": SPECIALS.index(TOKENS["image_end_token"]),
        }
        nested = draw.varies("text_config", 0.5)
        if "tie_word_embeddings" in text and draw.varies("tied beside", 0.6):
            raw["tie_word_embeddings"] = text["tie_word_embeddings"]
        raw |= {"text_config": text} if nested else text
        (architecture,) = self.architectures
        model = write_model(draw, path, raw, architecture)
        draw_ends(draw, path, text if nested else raw, 2, 1)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        cell = patch * merge
        _write_processor(draw, path, patch, merge)
        return Drawn(
            path,
            same_weights(HunyuanReference(path), model),
            Style(FRAME, "</s>", placeholder=lambda index, count: IMAGE, area=60 * cell * cell, longest=8.0),
            _TOKENS,
            media=frozenset({raw["image_token_id"]}),
        )


def _tower(draw: Draw, patch: int, merge: int) -> dict[str, Any]:
    tower = draw_sizes(draw, side=0, patch=patch)
    del tower["image_size"]
    tower["max_image_size"] = patch * draw.integer("position table's side", 2, 9)
    if merge != 2 or draw.varies("merge stated", 0.7):
        tower["spatial_merge_size"] = merge
    if draw.varies("temporal patch stated in the tower", 0.4):
        tower["temporal_patch_size"] = 1
    tower["hidden_act"] = draw.variant("tower activation", ("gelu", "gelu_pytorch_tanh", "relu"), 0.3)
    tower["rms_norm_eps"] = draw.variant("tower norm eps", (1e-5, 1e-3), 0.3)
    tower["interpolate_mode"] = draw.variant("interpolation", ("bilinear", "bicubic"), 0.3)
    for field, value in (("hidden_act", "gelu"), ("rms_norm_eps", 1e-5), ("interpolate_mode", "bilinear")):
        if tower[field] == value:
            draw.spelled(tower, field)
    return tower


def _write_processor(draw: Draw, path: Path, patch: int, merge: int) -> None:
    """preprocessor_config.json, with bounds in one of three spellings."""
    rng, area = draw.stream("pixel bounds"), (patch * merge) ** 2
    low, high = area * rng.choice((4, 6)), area * rng.choice((12, 30, 60))
    how = draw.choice("bounds", ("size", "pixels", "both"))
    stated: dict[str, Any] = {"patch_size": patch, "merge_size": merge, **draw_pixels(draw)}
    if draw.varies("temporal patch stated", 0.5):
        stated["temporal_patch_size"] = 1
    if how != "pixels":
        stated["size"] = {"shortest_edge": low, "longest_edge": high}
    if how != "size":
        stated |= {"min_pixels": low, "max_pixels": high}
    write_json(path / "preprocessor_config.json", stated)
