"""A tiny LFM2-VL checkpoint, and Transformers' model and processor of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.families.without_torchvision import WithoutTorchvision, imported
from tests.engine.tiny import LFM2_TEXT, spread, tokenizer

IMAGE = "<image>"
FRAME = "<|startoftext|><|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SPECIALS = (
    "<|pad|>",
    "<|startoftext|>",
    "<|im_end|>",
    "<|im_start|>",
    IMAGE,
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
    *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
)
#: Tiles of 24 pixels, in patches of 4 of which 2 by 2 are one row; images of 4 to 9 rows as a whole.
PROCESSOR: dict[str, Any] = {
    "encoder_patch_size": 4,
    "downsample_factor": 2,
    "tile_size": 24,
    "min_tiles": 2,
    "max_tiles": 4,
    "min_image_tokens": 4,
    "max_image_tokens": 9,
    "max_pixels_tolerance": 2.0,
    "use_thumbnail": True,
}


def make_lfm2_vl(path: Path, hub: bool) -> Path:
    """A checkpoint with a table of 5x5 positions, which sides of images enlarge or reduce.

    Args:
        hub: tied embeddings, config.json in the spelling of the first releases, and several shards.
    """
    tok = tokenizer(SPECIALS, bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>")
    text = {key: value for key, value in LFM2_TEXT.items() if key != "rope_parameters"}
    config = transformers.Lfm2VlConfig(
        text_config={
            "model_type": "lfm2",
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "vocab_size": len(tok),
            "max_position_embeddings": 1024,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
        },
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": 4,
            "num_patches": 25,
        },
        image_token_id=SPECIALS.index(IMAGE),
        projector_hidden_size=40,
        projector_use_layernorm=hub,
        tie_word_embeddings=hub,
    )
    model = transformers.Lfm2VlForConditionalGeneration(config)
    spread(model, seed=8, embedding_std=0.05 if hub else 1.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    processor = {"image_processor_type": "Lfm2VlImageProcessor", **PROCESSOR}
    (path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    if hub:
        stated = json.loads((path / "config.json").read_text())
        kinds = stated["text_config"].pop("layer_types")
        full = [layer for layer, kind in enumerate(kinds) if kind != "conv"]
        stated["text_config"] |= {"full_attn_idxs": full, "tie_embedding": True}
        stated["tie_embedding"] = stated.pop("tie_word_embeddings")
        (path / "config.json").write_text(json.dumps(stated))
        as_on_the_hub(path, **processor)
    return path


def processor_of(path: Path, **options: Any) -> Any:
    """Transformers' processor of a checkpoint, with ``options`` of its image processor."""
    images, texts = imported("lfm2_vl.image_processing_lfm2_vl", "lfm2_vl.processing_lfm2_vl")
    both = type("Lfm2VlImageProcessor", (images.Lfm2VlImageProcessor, WithoutTorchvision), {})
    nested = path / "processor_config.json"
    stated = json.loads(nested.read_text()) if nested.exists() else {}
    if "image_processor" not in stated:
        stated["image_processor"] = json.loads((path / "preprocessor_config.json").read_text())
    made = both(**{**stated.pop("image_processor"), **options})
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    return texts.Lfm2VlProcessor(made, tok, **stated)


class Lfm2VlReference:
    """Transformers' model and processor.

    Args:
        options: of the image processor.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        cls = transformers.Lfm2VlForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = processor_of(path, **options)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = [list(prompt.pictures)] if prompt.pictures else None
        arguments = dict(self.processor(text=[prompt.text], images=pictures, return_tensors="pt"))
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
