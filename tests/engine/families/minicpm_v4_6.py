"""Tiny checkpoints of MiniCPM-V 4.6 and 4.7, and Transformers' models and processors of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import QWEN3_5_TEXT, TRANSFORMERS, spread, tokenizer

IMAGE = "<|image_pad|>"
MARKS = {
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE, "<|video_pad|>", *MARKS.values())
#: Images and slices of about 24 by 24 pixels, in patches of 3 of which 4 by 4 are one row.
PROCESSOR: dict[str, Any] = {"patch_size": 3, "scale_resolution": 24, "max_slice_nums": 6}
_PACKAGE = "transformers.models.minicpmv4_"


def make_tokenizer() -> Any:
    named = {"image_token": IMAGE, "video_token": "<|video_pad|>", **MARKS}
    return tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named)


def canvas_ids(tok: Any) -> dict[str, int]:
    """The fields of version 4.7 that name the tokens around images and slices."""
    names = ("image_start", "image_end", "slice_start", "slice_end")
    ids = {f"{name}_id": SPECIALS.index(MARKS[f"{name}_token"]) for name in names}
    (newline,) = tok("\n").input_ids
    return {**ids, "newline_id": newline}


def make_minicpm_v4_6(path: Path, hub: bool, version: int = 6) -> Path:
    """A checkpoint with a table of 7x7 positions.

    Args:
        hub: tied embeddings, several shards, images without numbers, in the mode that keeps four times as
            many rows.
        version: 6 or 7.
    """
    mode = "4x" if hub else "16x"
    tok = make_tokenizer()
    if TRANSFORMERS < (5, 23):
        pytest.skip("these releases fail for images of several sizes, and slice them otherwise")
    config = getattr(transformers, f"MiniCPMV4_{version}Config")(
        text_config={
            "model_type": "qwen3_5_text",
            **QWEN3_5_TEXT,
            "vocab_size": len(tok),
            "max_position_embeddings": 1024,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 22,
            "patch_size": 3,
        },
        insert_layer_id=1,
        image_token_id=SPECIALS.index(IMAGE),
        video_token_id=SPECIALS.index("<|video_pad|>"),
        downsample_mode=mode,
        tie_word_embeddings=hub,
        **(canvas_ids(tok) if version == 7 else {}),
    )
    model = getattr(transformers, f"MiniCPMV4_{version}ForConditionalGeneration")(config)
    spread(model, seed=8, embedding_std=0.05 if hub else 1.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    processor = {"image_processor_type": "MiniCPMV4_6ImageProcessor", "downsample_mode": mode, **PROCESSOR}
    processor["use_image_id"] = not hub
    (path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    if hub:
        config_json = json.loads((path / "config.json").read_text())
        as_on_the_hub(path, **processor)
        (path / "config.json").write_text(json.dumps(config_json))
    return path


def processor_of(path: Path, version: int = 6, **options: Any) -> Any:
    """Transformers' processor of a checkpoint without its video half, which needs torchvision.

    Args:
        options: fields of the image processor, over those of the checkpoint.
    """
    module = importlib.import_module(f"{_PACKAGE}{version}.processing_minicpmv4_{version}")
    whole = getattr(module, f"MiniCPMV4_{version}Processor")
    pil = importlib.import_module(_PACKAGE + "6.image_processing_pil_minicpmv4_6")
    nested = path / "processor_config.json"
    if nested.exists():
        stated = json.loads(nested.read_text())["image_processor"]
    else:
        stated = json.loads((path / "preprocessor_config.json").read_text())
    made = pil.MiniCPMV4_6ImageProcessorPil(**{**stated, **options})

    def create(self: Any, image_processor: Any, tokenizer: Any) -> None:
        self.video_processor = SimpleNamespace(slice_mode=True, downsample_mode=made.downsample_mode)
        whole.__init__(self, image_processor, self.video_processor, tokenizer)

    parts = classmethod(lambda cls: ["image_processor", "video_processor", "tokenizer"])
    check = {"check_argument_for_proper_class": lambda self, name, value: None}
    image_only = type(whole.__name__, (whole,), {"__init__": create, "get_attributes": parts, **check})
    return image_only(made, transformers.PreTrainedTokenizerFast.from_pretrained(path))


class MiniCPMV46Reference:
    """Transformers' model and processor.

    Args:
        version: 6 or 7.
        options: of the image processor.
    """

    def __init__(self, path: Path, version: int = 6, **options: Any) -> None:
        cls = getattr(transformers, f"MiniCPMV4_{version}ForConditionalGeneration")
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = processor_of(path, version, **options)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = [list(prompt.pictures)] if prompt.pictures else None
        made = self.processor(text=[prompt.text], images=pictures, return_tensors="pt")
        arguments = {name: torch.as_tensor(value) for name, value in made.items()}
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
