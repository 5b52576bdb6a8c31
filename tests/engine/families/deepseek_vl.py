"""Tiny checkpoints of DeepSeek-VL, and Transformers' model and processor of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import TEXT_SIZES, rewrite_tensors, spread, tiny_siglip, tokenizer

SPECIALS = ("<pad>", "<bos>", "<eos>", "<image_placeholder>")
FRAME = "User: {}\n\nAssistant:"
IMAGE = "<image_placeholder>"
#: The processor's least side is larger than what is left of the most elongated images.
SIDE, PATCH, ROWS, LEAST = 21, 7, 9, 4


def deepseek_vl_tokenizer() -> Any:
    named = {"image_token": IMAGE}
    tok = tokenizer(
        SPECIALS, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=named
    )
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return tok


def make_deepseek_vl(path: Path, hub: bool = False, **processor: Any) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones.

    Args:
        processor: further fields of the image processor.
    """
    tok = deepseek_vl_tokenizer()
    config = transformers.DeepseekVLConfig(
        vision_config=tiny_siglip(SIDE, PATCH),
        text_config={
            "model_type": "llama",
            "vocab_size": len(tok),
            **TEXT_SIZES,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_id=SPECIALS.index(IMAGE),
        tie_word_embeddings=hub,
    )
    model = transformers.DeepseekVLForConditionalGeneration(config)
    spread(model, seed=23, embedding_std=0.05 if hub else 1.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = transformers.DeepseekVLImageProcessorPil(
        **{
            "size": {"height": SIDE, "width": SIDE},
            "min_size": LEAST,
            "image_mean": [0.5, 0.4, 0.6],
            "image_std": [0.5] * 3,
            **processor,
        }
    )
    images.save_pretrained(path)
    if hub:
        tower = "vision_model."
        rewrite_tensors(
            path,
            lambda tensors: {
                name.replace(tower, tower + "vision_model.", 1): value for name, value in tensors.items()
            },
        )
        as_on_the_hub(path, **images.to_dict())
        (path / "processor_config.json").write_text(json.dumps({"num_image_tokens": ROWS}))
    return path


class DeepseekVLReference:
    """Transformers' model and processor; ``rows`` of an image."""

    def __init__(self, path: Path, rows: int = ROWS) -> None:
        cls = transformers.DeepseekVLForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        images = transformers.DeepseekVLImageProcessorPil.from_pretrained(path)
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        self.processor = transformers.DeepseekVLProcessor(images, tok, num_image_tokens=rows)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = list(prompt.pictures) or None
        made = self.processor(text=[prompt.text], images=pictures, return_tensors="pt")
        names = ("input_ids", "attention_mask", "pixel_values")
        arguments = {name: torch.as_tensor(made[name]) for name in names if name in made}
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
