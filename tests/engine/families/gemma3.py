"""Tiny checkpoints of Gemma 3 with images, and Transformers' processing of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import rewrite_tensors, spread, tiny_siglip, tokenizer

SPECIALS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<start_of_turn>",
    "<end_of_turn>",
)
TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
FRAME = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
IMAGE = "<start_of_image>"
SIDE, PATCH, ROWS = 30, 5, 9
_SIZE = {"height": SIDE, "width": SIDE}


def gemma3_tokenizer() -> Any:
    # Several line feeds are one token, as in the public tokenizer: those around an image join others.
    words = ["\n" * count for count in (2, 3, 4)]
    return tokenizer(
        SPECIALS,
        words=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=TOKENS,
    )


def make_gemma3(path: Path, hub: bool = False) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones."""
    tok = gemma3_tokenizer()
    config = transformers.Gemma3Config(
        vision_config=tiny_siglip(SIDE, PATCH),
        text_config={
            "model_type": "gemma3_text",
            "vocab_size": len(tok) + 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            # Longer than an image, as in public models: releases of Transformers differ in what they make of
            # longer images.
            "sliding_window": 11,
            "max_position_embeddings": 512,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            },
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        mm_tokens_per_image=ROWS,
        boi_token_index=SPECIALS.index("<start_of_image>"),
        eoi_token_index=SPECIALS.index("<end_of_image>"),
        image_token_index=SPECIALS.index("<image_soft_token>"),
        eos_token_id=[1, SPECIALS.index("<end_of_turn>")],
    )
    model = spread(transformers.Gemma3ForConditionalGeneration(config), seed=31, embedding_std=0.05)
    with torch.no_grad():
        # The connector's matrix is no linear layer of theirs.
        model.model.multi_modal_projector.mm_input_projection_weight.div_(32**0.5)
    model.generation_config.eos_token_id = [1, SPECIALS.index("<end_of_turn>")]
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = image_processor_class()(size=_SIZE)
    if hub:
        _publish(path, images.to_dict())
    else:
        transformers.Gemma3Processor(images, tok, image_seq_length=ROWS).save_pretrained(path)
    return path


def _publish(path: Path, images: dict[str, Any]) -> None:
    rewrite_tensors(path, lambda tensors: {_hub_name(name): value for name, value in tensors.items()})
    config = json.loads((path / "config.json").read_text())
    text = config["text_config"]
    ropes = text.pop("rope_parameters")
    text |= {
        "rope_theta": ropes["full_attention"]["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": ropes["full_attention"]["factor"]},
        "rope_local_base_freq": ropes["sliding_attention"]["rope_theta"],
        "sliding_window_pattern": 2,
    }
    for field in ("tie_word_embeddings", "use_bidirectional_attention", "eos_token_id"):
        text.pop(field, None)
    config.pop("tie_word_embeddings", None)
    (path / "config.json").write_text(json.dumps(config))
    as_on_the_hub(path, **images)
    stated = {"image_seq_length": ROWS, "processor_class": "Gemma3Processor"}
    (path / "processor_config.json").write_text(json.dumps(stated))


def _hub_name(name: str) -> str:
    """The name of a tensor in public checkpoints."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def image_processor_class() -> Any:
    module = importlib.import_module("transformers.models.gemma3.image_processing_pil_gemma3")
    return module.Gemma3ImageProcessorPil


class Gemma3Reference:
    """Transformers' model and processor.

    Args:
        options: of the whole processor.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self.options = options
        cls = transformers.Gemma3ForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        images = image_processor_class().from_pretrained(path)
        rows = self.model.config.mm_tokens_per_image
        self.processor = transformers.Gemma3Processor(images, tok, image_seq_length=rows)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = list(prompt.pictures) or None
        made = self.processor(text=prompt.text, images=pictures, return_tensors="pt", **self.options)
        return Inputs(made["input_ids"][0].tolist(), self.model, dict(made))
