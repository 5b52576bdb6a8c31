"""Tiny checkpoints of Ovis2, and Transformers' processing of their images."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.families.ovis2.layout import INDICATORS
from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import TEXT_SIZES, spread, tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<IMG_ATOM>", *INDICATORS)
#: 4 patches per side, and 1 pixel that no patch covers.
SIDE, PATCH, STRIDE = 25, 6, 2
ROW = SPECIALS.index("<IMG_ATOM>")
#: What config.json says of the tokens of images.
TOKENS: dict[str, Any] = {
    "image_token_id": ROW,
    "visual_indicator_token_ids": [SPECIALS.index(name) for name in INDICATORS],
}
_SIZE = {"height": SIDE, "width": SIDE}


def make_ovis2(
    path: Path,
    hub: bool = False,
    *,
    text: str = "qwen2",
    processor: dict[str, Any] | None = None,
    **tower: Any,
) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones.

    Args:
        text: the decoder's ``model_type``.
        processor: further fields of the image processor.
        tower: further fields of the tower's configuration.
    """
    tok = tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.Ovis2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_stride": STRIDE,
            "vocab_size": 40,
            **tower,
        },
        text_config={
            "model_type": text,
            "vocab_size": len(tok),
            **TEXT_SIZES,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vocab_size=len(tok),
        hidden_size=64,
        tie_word_embeddings=hub,
        **TOKENS,
    )
    model = spread(
        transformers.Ovis2ForConditionalGeneration(config), seed=29, embedding_std=0.05 if hub else 1.0
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = image_processor()(
        **{"size": _SIZE, "crop_to_patches": True, "max_patches": 6, **(processor or {})}
    )
    images.save_pretrained(path)
    if hub:
        as_on_the_hub(path, **images.to_dict())
    return path


def image_processor() -> Any:
    """Transformers' class that works with Pillow."""
    return importlib.import_module(
        "transformers.models.ovis2.image_processing_pil_ovis2"
    ).Ovis2ImageProcessorPil


class Ovis2Reference:
    """Transformers' model and processor.

    Args:
        options: of the processor.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self.options = options
        cls = transformers.Ovis2ForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        tower = self.model.config.vision_config
        side = tower.image_size // tower.patch_size // tower.hidden_stride
        self.processor = transformers.Ovis2Processor(
            image_processor().from_pretrained(path),
            transformers.PreTrainedTokenizerFast.from_pretrained(path),
            image_seq_length=side * side,
        )

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = list(prompt.pictures) or None
        arguments = dict(
            self.processor(text=prompt.text, images=pictures, return_tensors="pt", **self.options)
        )
        arguments.pop("grids", None)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
