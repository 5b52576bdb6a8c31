"""A tiny VideoLLaMA 3 checkpoint, and Transformers' model and processor of it, without videos."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from tests.engine.families.references import ImagesReference
from tests.engine.families.without_torchvision import imported
from tests.engine.tiny import QWEN_SPECIALS, TEXT_SIZES, split_shards, spread, tokenizer

IMAGE = "<|image_pad|>"


def make_video_llama_3(path: Path, hub: bool) -> Path:
    """A checkpoint whose images have 16 to 60 rows.

    Args:
        hub: several shards, tied embeddings, a file of each processor; that of videos joins squares.
    """
    tok = tokenizer(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.VideoLlama3Config(
        text_config={
            "model_type": "qwen2",
            **TEXT_SIZES,
            "vocab_size": len(tok),
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": hub,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
        },
        image_token_id=QWEN_SPECIALS.index(IMAGE),
        video_token_id=QWEN_SPECIALS.index("<|video_pad|>"),
    )
    model = transformers.VideoLlama3ForConditionalGeneration(config)
    spread(model, seed=9, embedding_std=0.05 if hub else 1.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    stated = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 960}}
    if hub:
        (path / "preprocessor_config.json").write_text(json.dumps(stated))
        (path / "video_preprocessor_config.json").write_text(json.dumps({**stated, "merge_size": 2}))
        split_shards(path)
    else:
        (path / "processor_config.json").write_text(json.dumps({"image_processor": stated}))
    return path


class VideoLlama3Reference(ImagesReference):
    """Transformers' model and processor, of images alone: its half for videos needs torchvision."""

    def __init__(self, path: Path) -> None:
        cls = transformers.VideoLlama3ForConditionalGeneration
        model = cls.from_pretrained(path, dtype=torch.float32).eval()
        (module,) = imported("video_llama_3.processing_video_llama_3")
        parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
        image_only = type("VideoLlama3Processor", (module.VideoLlama3Processor,), {"get_attributes": parts})
        nested, file = path / "processor_config.json", path / "preprocessor_config.json"
        stated = json.loads((nested if nested.exists() else file).read_text())
        images = transformers.VideoLlama3ImageProcessorPil(**stated.get("image_processor", stated))
        super().__init__(
            model, image_only(images, transformers.PreTrainedTokenizerFast.from_pretrained(path))
        )
