"""A tiny checkpoint of Granite-Docling, and Transformers' model and processor of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.tiny import rewrite_tensors, split_shards, spread, tokenizer

SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|end_of_text|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
HAS_GRANITE_DOCLING = hasattr(transformers, "GraniteDoclingConfig")
FRAME = "<|bos|>User: {}<|end_of_text|>\nAssistant:"
SIDE, PATCH, SQUARE = 32, 4, 4
#: Pages wider than this are spreads, with more tiles.
SPREAD = {"dense_max_patches": 6, "dense_max_scale": 0.9, "dense_min_aspect": 2.0, "dense_max_aspect": 8.0}


def granite_docling_tokenizer() -> Any:
    tok = tokenizer(
        SPECIALS, vocab_size=360, bos_token="<|bos|>", eos_token="<|end_of_text|>", pad_token="<|pad|>"
    )
    # Two line feeds are one token, as in Granite's vocabulary.
    tok.add_tokens(["\n\n"])
    return tok


def make_granite_docling_tiles(path: Path, hub: bool = False) -> Path:
    """A checkpoint as Transformers saves it, or as public ones: in parts, with heads for further tokens."""
    if not HAS_GRANITE_DOCLING:
        pytest.skip("this release of Transformers has no such family")
    tok = granite_docling_tokenizer()
    config = transformers.GraniteDoclingConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "scale_factor": SQUARE,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [2, 0],
        },
        text_config={
            "vocab_size": len(tok),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "embedding_multiplier": 1.5,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_id=SPECIALS.index("<image>"),
        pad_token_id=0,
        density_router_hidden_size=8,
    )
    model = transformers.GraniteDoclingForConditionalGeneration(config)
    spread(model, seed=23, embedding_std=0.3)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    sizes = {"size": {"height": SIDE, "width": SIDE}, "max_patches": 4, **SPREAD}
    transformers.GraniteDoclingImageProcessorPil(**sizes).save_pretrained(path)
    if hub:
        rewrite_tensors(path, lambda found: {**found, "mtp.layers.0.norm.weight": torch.ones(4)})
        split_shards(path)
    return path


class GraniteDoclingReference:
    """Transformers' model and processor.

    Args:
        options: fields of the image processor, over those of the checkpoint.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        cls = transformers.GraniteDoclingForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        vision = self.model.config.vision_config
        rows = (vision.image_size // vision.patch_size // vision.scale_factor) ** 2
        self.images = transformers.GraniteDoclingImageProcessorPil.from_pretrained(path, **options)
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        self.processor = transformers.GraniteDoclingProcessor(self.images, tok, image_seq_len=rows)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = [list(prompt.pictures)] if prompt.pictures else None
        arguments = dict(self.processor(text=prompt.text, images=pictures, return_tensors="pt"))
        arguments.pop("token_type_ids", None)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
