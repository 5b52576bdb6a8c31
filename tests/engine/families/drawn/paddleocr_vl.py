"""Draws PaddleOCR-VL checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.engine.families.drawn.checkpoint import Drawn, draw_ends, same_weights, write_json, write_model
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_theta, draw_tower
from tests.engine.families.paddleocr_vl import IMAGE, SPECIALS, PaddleOCRReference
from tests.engine.tiny import rewrite_tensors, tokenizer

_TOKENS = 512


class PaddleOCRFamily:
    """A SigLIP for images of any size, and a decoder with positions on three axes."""

    name = "paddleocr_vl"
    architectures = ("PaddleOCRVLForConditionalGeneration",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        roles = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
        tok = tokenizer(
            SPECIALS, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=roles
        )
        tok.save_pretrained(path)
        text = draw_decoder(draw, "paddleocr_vl", len(tok), tokens=_TOKENS, section=True)
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        patch = draw.choice("patch", (4, 6, 7))
        side = patch * draw.integer("position table's side", 2, 7) + draw.variant("a rest", (0, 1), 0.3)
        tower = draw_tower(draw, side=side, patch=patch)
        merge = draw.choice("merge", (2, 2, 2, 1, 3))
        if merge != 2 or draw.varies("merge stated", 0.7):
            tower["spatial_merge_size"] = merge
        if draw.varies("fields of videos", 0.4):
            tower |= {"temporal_patch_size": 2, "tokens_per_second": 2}
        if draw.varies("tower model_type", 0.6):
            tower["model_type"] = draw.choice("tower's type", ("paddleocr_vl", "paddleocr_vl_vision"))
        raw: dict[str, Any] = {
            "model_type": self.name,
            "torch_dtype": "float32",
            "vision_config": tower | draw_theta(draw, 0.2),
            "image_token_id": SPECIALS.index("<|IMAGE_PLACEHOLDER|>"),
            "vision_start_token_id": SPECIALS.index("<|IMAGE_START|>"),
            "vision_end_token_id": SPECIALS.index("<|IMAGE_END|>"),
        }
        nested = draw.varies("text_config", 0.5)
        if nested and draw.varies("tied stated twice", 0.5):
            raw["tie_word_embeddings"] = text.get("tie_word_embeddings", True)
        elif "tie_word_embeddings" in text:
            raw["tie_word_embeddings"] = text.pop("tie_word_embeddings")
        raw |= {"text_config": text} if nested else text
        (architecture,) = self.architectures
        model = write_model(draw, path, raw, architecture)
        if draw.varies("a head of its own", 0.4) and (path / "model.safetensors").is_file():
            rewrite_tensors(path, partial(_with_head, draw.seed))
        draw_ends(draw, path, text if nested else raw, 2, 1)
        write_json(path / "config.json", {"architectures": [architecture], **raw})
        cell = patch * merge
        _write_processor(draw, path, patch, merge)
        style = Style(
            "<s>User: {}\nAssistant:\n",
            "</s>",
            placeholder=lambda index, count: IMAGE,
            area=60 * cell * cell,
            longest=draw.variant("longest images", (8.0, 100.0), 0.2),
        )
        return Drawn(
            path,
            same_weights(PaddleOCRReference(path), model),
            style,
            _TOKENS,
            media=frozenset({raw["image_token_id"]}),
            lengths=lengths_of("paddleocr_vl", text),
        )


def _with_head(seed: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with a head that differs from the embeddings, as the public checkpoint has."""
    width = tensors["model.embed_tokens.weight"].shape[1]
    noise = torch.randn(
        tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(seed)
    )
    return {"lm_head.weight": noise * 1.3 / width**0.5, **tensors}


def _write_processor(draw: Draw, path: Path, patch: int, merge: int) -> None:
    """preprocessor_config.json, with bounds in one of three spellings."""
    rng, area = draw.stream("pixel bounds"), (patch * merge) ** 2
    low, high = area * rng.choice((1, 4, 6)), area * rng.choice((12, 30, 60))
    how = draw.choice("bounds", ("size", "pixels", "both"))
    stated: dict[str, Any] = {"patch_size": patch, "merge_size": merge, **draw_pixels(draw)}
    if draw.varies("temporal patch stated", 0.5):
        stated["temporal_patch_size"] = 1
    if how != "pixels":
        stated["size"] = {"shortest_edge": low, "longest_edge": high}
    if how != "size":
        stated |= {"min_pixels": low, "max_pixels": high}
    write_json(path / "preprocessor_config.json", stated)
