"""Draws checkpoints of models that make vectors alone: ColPali and ColQwen2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.families import colpali, qwen
from tests.engine.families.colqwen2 import ColQwen2Reference
from tests.engine.families.drawn.checkpoint import Drawn, same_weights, write_json, write_model
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.decoder import draw_decoder
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.qwen_vl import QwenVLFamily
from tests.engine.families.drawn.rope import lengths_from_one, lengths_of
from tests.engine.families.drawn.vision import draw_pixels, draw_tower
from tests.engine.tiny import QWEN_SPECIALS, tokenizer

_TOKENS = 512
_EMBED = {"task": "embed"}


class ColPaliFamily:
    """PaliGemma with a vector for each token; all tokens of a prompt attend to each other."""

    name = "colpali"
    architectures = ("ColPaliForRetrieval",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = tokenizer(colpali.SPECIALS, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
        tok.save_pretrained(path)
        text = draw_decoder(draw, "gemma", len(tok), tokens=_TOKENS)
        # There is no head.
        text.pop("tie_word_embeddings", None)
        text["model_type"] = "gemma"
        patch, per_side = draw.choice("patch", (4, 6, 7)), draw.integer("patches per side", 1, 5)
        side = patch * per_side + draw.variant("pixels without a patch", (0, 1, patch - 1), 0.2)
        tower = draw_tower(draw, side=side, patch=patch)
        vlm: dict[str, Any] = {
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": {**tower, "model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_index": colpali.SPECIALS.index("<image>"),
            "projection_dim": text["hidden_size"],
        }
        raw = {
            "model_type": "colpali",
            "torch_dtype": "float32",
            "vlm_config": vlm,
            "embedding_dim": draw.choice("numbers of a vector", (8, 24, 128)),
        }
        (architecture,) = self.architectures
        model = write_model(draw, path, raw, architecture, most_embedding=0.1)
        write_json(
            path / "preprocessor_config.json",
            {
                "image_processor_type": "SiglipImageProcessor",
                "size": {"height": side, "width": side},
                "image_seq_length": per_side**2,
                **draw_pixels(draw),
            },
        )
        style = Style("<bos>{}\n", placeholder=lambda index, count: "<image>", longest=20.0)
        return Drawn(
            path,
            same_weights(colpali.ColPaliReference(path, per_side**2), model),
            style,
            _TOKENS,
            _EMBED,
            frozenset({vlm["image_token_index"]}),
            lengths_from_one(lengths_of("gemma", text)),
            together=_TOKENS,
            vectors=True,
        )


class ColQwen2Family:
    """Qwen2-VL or Qwen2.5-VL with a vector for each token."""

    name = "colqwen2"
    architectures = ("ColQwen2ForRetrieval",)

    def make(self, draw: Draw, path: Path) -> Drawn:
        tok = tokenizer(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        tok.save_pretrained(path)
        inner = QwenVLFamily(draw.variant("model inside", ("Qwen2VL", "Qwen2_5_VL"), 0.5))
        vlm = inner.config(draw, len(tok), _TOKENS)
        raw = {
            "model_type": "colqwen2",
            "torch_dtype": "float32",
            "vlm_config": vlm,
            "embedding_dim": draw.choice("numbers of a vector", (8, 24, 128)),
        }
        (architecture,) = self.architectures
        model = write_model(draw, path, raw, architecture)
        vision = {"spatial_merge_size": 2, "temporal_patch_size": 2, **vlm["vision_config"]}
        cell = vision["patch_size"] * vision["spatial_merge_size"]
        inner.write_processor(draw, path, vision, cell)
        style = Style(
            qwen.FRAME, "<|im_end|>\n", placeholder=lambda index, count: qwen.IMAGE, area=60 * cell * cell
        )
        return Drawn(
            path,
            same_weights(ColQwen2Reference(path), model),
            style,
            _TOKENS,
            _EMBED,
            frozenset({vlm["image_token_id"]}),
            lengths_of(inner.name, vlm.get("text_config") or vlm),
            vectors=True,
        )
