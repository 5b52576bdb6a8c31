"""A tiny PaddleOCR-VL checkpoint, and Transformers' model and processor of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.tiny import rewrite_tensors, split_shards, spread, tokenizer

IMAGE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
SPECIALS = ("<unk>", "<s>", "</s>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>")


def make_paddleocr_vl(path: Path, hub: bool) -> Path:
    """A checkpoint with a table of 5x5 positions and heads wider than their share of the hidden size.

    Args:
        hub: write it as the public one is: flat config.json in the old spelling, preprocessor_config.json,
            tensors that nothing uses, a head of its own, and several shards.
    """
    image = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    tok = tokenizer(
        SPECIALS, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=image
    )
    ids = {text: tok.convert_tokens_to_ids(text) for text in SPECIALS}
    config = transformers.PaddleOCRVLConfig(
        text_config={
            "vocab_size": len(tok),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 5, 5]},
            "use_bias": not hub,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 22,
            "patch_size": 4,
        },
        image_token_id=ids["<|IMAGE_PLACEHOLDER|>"],
        vision_start_token_id=ids["<|IMAGE_START|>"],
        vision_end_token_id=ids["<|IMAGE_END|>"],
        tie_word_embeddings=not hub,
    )
    model = transformers.PaddleOCRVLForConditionalGeneration(config)
    spread(model, seed=8, embedding_std=1.0 if hub else 0.05)
    model.generation_config.eos_token_id = ids["</s>"]
    model.save_pretrained(path)
    tok.save_pretrained(path)
    _processor().save_pretrained(path)
    if hub:
        _as_on_the_hub(path)
    return path


def _processor() -> Any:
    return transformers.PaddleOCRVLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096}, image_mean=[0.5] * 3
    )


def _as_on_the_hub(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("dtype", "model_type", "tie_word_embeddings"):
        text.pop(name, None)
    config = {**text, **config, "rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
    config["rope_scaling"] = {"rope_type": "default", "type": "default", "mrope_section": [2, 5, 5]}
    config["vision_config"] |= {"temporal_patch_size": 2, "tokens_per_second": 2}
    (path / "config.json").write_text(json.dumps(config))
    processor = {"min_pixels": 256, "max_pixels": 4096, "patch_size": 4, "merge_size": 2}
    processor |= {"temporal_patch_size": 1, "image_mean": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    rewrite_tensors(path, _with_unused)
    split_shards(path)


def _with_unused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tower = "visual.vision_model."
    unused = ("embeddings.packing_position_embedding.weight", "head.probe", "head.mlp.fc1.weight")
    return {**tensors, **{tower + name: torch.zeros(3) for name in unused}}


class PaddleOCRReference:
    """Transformers' model and processor."""

    def __init__(self, path: Path) -> None:
        kind = transformers.PaddleOCRVLForConditionalGeneration
        self.model = kind.from_pretrained(path, dtype=torch.float32).eval()
        for module in self.model.modules():
            # The model's own code and later releases of Transformers stretch the table of positions so.
            if hasattr(module, "interpolation_align_corners"):
                module.interpolation_align_corners = False
        images = transformers.PaddleOCRVLImageProcessorPil.from_pretrained(path)
        tok = PreTrainedTokenizerFast.from_pretrained(path)
        self.processor = transformers.PaddleOCRVLProcessor(images, tok)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        made = self.processor(text=[prompt.text], images=list(prompt.pictures) or None, return_tensors="pt")
        arguments = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
