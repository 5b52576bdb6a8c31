"""Tiny checkpoints of Mistral3 and LightOnOCR, and Transformers' processing of their images."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import MINISTRAL_ROPE, spread, tokenizer

MISTRAL_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
LIGHTON_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|vision_pad|>",
    "<|vision_end|>",
)
PATCH, SIDE = 8, 2
_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 96,
    "patch_size": PATCH,
    "hidden_act": "silu",
}
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Not the hidden size divided by the heads.
    "head_dim": 24,
    "max_position_embeddings": 512,
}


def make_mistral3(path: Path, hub: bool = False, *, layer: int = -1, kind: str = "mistral") -> Path:
    """A checkpoint with a head of its own, as Transformers saves it or as the public ones are.

    The config.json of the public ones has no ``tie_word_embeddings``.

    Args:
        kind: of the decoder, ``mistral`` or ``ministral3``.
    """
    tok = tokenizer(MISTRAL_SPECIALS, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    text = {
        "model_type": kind,
        "vocab_size": len(tok),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "sliding_window": None,
        **({"rope_theta": 1e9} if kind == "mistral" else {"rope_parameters": dict(MINISTRAL_ROPE)}),
    }
    config = transformers.Mistral3Config(
        vision_config=dict(_TOWER),
        text_config={**_TEXT, **text},
        image_token_index=MISTRAL_SPECIALS.index("[IMG]"),
        vision_feature_layer=layer,
        spatial_merge_size=SIDE,
        tie_word_embeddings=False,
    )
    model = spread(transformers.Mistral3ForConditionalGeneration(config), seed=17)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    _save_processor(path, "PixtralProcessor", {"patch_size": PATCH}, hub)
    if hub:
        stated = json.loads((path / "config.json").read_text())
        stated.pop("tie_word_embeddings")
        stated["text_config"].pop("tie_word_embeddings", None)
        (path / "config.json").write_text(json.dumps(stated))
    return path


def make_lighton_ocr(path: Path, hub: bool = False, *, patch: int = PATCH) -> Path:
    """Make a LightOnOCR checkpoint, with tied embeddings.

    Args:
        patch: the image processor's own ``patch_size``.
    """
    tok = tokenizer(
        LIGHTON_SPECIALS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
    )
    text = {"model_type": "qwen3", "vocab_size": len(tok), "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LightOnOcrConfig(
        vision_config=dict(_TOWER),
        text_config={**_TEXT, **text, "bos_token_id": 0},
        image_token_id=LIGHTON_SPECIALS.index("<|image_pad|>"),
        spatial_merge_size=SIDE,
    )
    model = spread(transformers.LightOnOcrForConditionalGeneration(config), seed=19, embedding_std=0.05)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    _save_processor(path, "LightOnOcrProcessor", {"patch_size": patch}, hub)
    return path


def _save_processor(path: Path, kind: str, image: dict[str, Any], hub: bool) -> None:
    patch = {"height": image["patch_size"], "width": image["patch_size"]}
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 96}, patch_size=patch)
    own = {"processor_class": kind, "patch_size": PATCH, "spatial_merge_size": SIDE}
    if hub:
        as_on_the_hub(path, **images.to_dict())
        (path / "processor_config.json").write_text(json.dumps(own))
    else:
        nested = {**own, "image_processor": images.to_dict()}
        (path / "processor_config.json").write_text(json.dumps(nested))


def _pixtral_processor() -> Any:
    """Transformers' PixtralProcessor. Its module asks for torchvision by an import of one function, which the
    module of the PIL processor has too."""
    package = "transformers.models.pixtral."
    same = importlib.import_module(package + "image_processing_pil_pixtral")
    with mock.patch.dict(sys.modules, {package + "image_processing_pixtral": same}):
        return importlib.import_module(package + "processing_pixtral").PixtralProcessor


def _lighton_ocr_processor() -> Any:
    return importlib.import_module(
        "transformers.models.lighton_ocr.processing_lighton_ocr"
    ).LightOnOcrProcessor


class SquaresReference:
    """Transformers' model and processor.

    Args:
        kind: ``Mistral3`` or ``LightOnOcr``.
    """

    def __init__(self, path: Path, kind: str) -> None:
        cls = getattr(transformers, f"{kind}ForConditionalGeneration")
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = self.processor_of(path, kind)

    @staticmethod
    def processor_of(path: Path, kind: str) -> Any:
        config = transformers.AutoConfig.from_pretrained(path)
        images = transformers.PixtralImageProcessorPil.from_pretrained(path)
        processor = _pixtral_processor() if kind == "Mistral3" else _lighton_ocr_processor()
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        patch, side = config.vision_config.patch_size, config.spatial_merge_size
        return processor(images, tok, patch_size=patch, spatial_merge_size=side)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = list(prompt.pictures) or None
        arguments = dict(self.processor(text=prompt.text, images=pictures, return_tensors="pt"))
        arguments.pop("token_type_ids", None)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
