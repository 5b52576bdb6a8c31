"""Tiny checkpoints of GOT-OCR 2, and Transformers' model and processor of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import TEXT_SIZES, spread, tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>")
PATCH = 4
#: 7 patches, which neither windows of 3 nor the two convolutions divide: 4 rows a crop.
SIDE, ROWS = 28, 4
IMAGE = "<img><imgpad></img>\n"
FRAME = (
    "<|im_start|>system\nfollow the instructions<|im_end|>"
    "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n"
)


def make_got_ocr2(path: Path, hub: bool = False, **tower: Any) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones.

    Args:
        tower: further fields of the tower's configuration.
    """
    tok = tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.GotOcr2Config(
        vision_config={
            "hidden_size": 32,
            "mlp_dim": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "output_channels": 16,
            "image_size": SIDE,
            "patch_size": PATCH,
            "window_size": 3,
            "global_attn_indexes": [1, 4],
            **tower,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tok),
            **TEXT_SIZES,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_index=SPECIALS.index("<imgpad>"),
        image_seq_length=ROWS,
        tie_word_embeddings=hub,
    )
    model = spread(
        transformers.GotOcr2ForConditionalGeneration(config), seed=41, embedding_std=0.05 if hub else 1.0
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    side = config.vision_config.image_size
    images = image_processor()(size={"height": side, "width": side})
    images.save_pretrained(path)
    if hub:
        as_on_the_hub(path, **images.to_dict())
    return path


def image_processor() -> Any:
    """Transformers' class that works with Pillow."""
    module = importlib.import_module("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    return module.GotOcr2ImageProcessorPil


class GotReference:
    """Transformers' model and processor.

    Args:
        options: of the processor.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self.options = {"num_image_tokens": ROWS, **options}
        cls = transformers.GotOcr2ForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        self.processor = transformers.GotOcr2Processor(
            image_processor().from_pretrained(path), self.tokenizer
        )

    def inputs(self, prompt: CasePrompt) -> Inputs:
        if not prompt.pictures:
            # The processor takes no text without an image.
            arguments = dict(self.tokenizer(prompt.text, return_tensors="pt"))
        else:
            made = self.processor(
                list(prompt.pictures), text=[prompt.text], return_tensors="pt", **self.options
            )
            arguments = {name: torch.as_tensor(value) for name, value in made.items()}
        arguments.pop("token_type_ids", None)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
