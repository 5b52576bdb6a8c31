"""Tiny checkpoints of Idefics3 and SmolVLM, and what Transformers makes of their images."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import spread, tokenizer

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)
PATCH = 4


def make_idefics3(path: Path, hub: bool = False) -> Path:
    return _make(path, "Idefics3", hub, factor=2, side=32)


def make_smolvlm(path: Path, hub: bool = False) -> Path:
    """Crops that end within a patch, with 25 patches per side: their buckets are not just those in order."""
    return _make(path, "SmolVLM", hub, factor=5, side=102)


def make_granite_docling(path: Path, hub: bool = False) -> Path:
    """An Idefics3 as granite-docling-258M is: tied embeddings, and fields that nothing reads."""
    _make(path, "Idefics3", hub, factor=4, side=32, tied=True)
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= {
        "architectures": ["VLlama3ForCausalLM"],
        "is_llama_config": True,
        "perceiver_config": {"model_type": "vllama3", "resampler_depth": 6},
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "use_resampler": False,
    }
    config["vision_config"] |= {
        "max_image_size": {"longest_edge": 32},
        "size": {"longest_edge": 32},
        "use_base_siglip": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def _make(path: Path, kind: str, hub: bool, *, factor: int, side: int, tied: bool = False) -> Path:
    """A checkpoint with crops of ``side`` pixels, and images of at most 2x2 or so of them."""
    try:
        getattr(transformers, f"{kind}ImageProcessorPil")()
    except ImportError:
        pytest.skip("older releases of Transformers need torchvision for this family")
    tok = tokenizer(SPECIALS, vocab_size=340, bos_token="<|im_start|>", eos_token="<end_of_utterance>")
    if kind == "SmolVLM":
        # As in Llama 3's vocabulary, two line feeds are one token.
        tok.add_tokens(["\n\n"])
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": PATCH,
    }
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=transformers.LlamaConfig(
            vocab_size=len(tok),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_id=SPECIALS.index("<image>"),
        scale_factor=factor,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    model = spread(
        getattr(transformers, f"{kind}ForConditionalGeneration")(config),
        seed=5,
        embedding_std=0.05 if tied else 1.0,
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    sizes = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
    getattr(transformers, f"{kind}ImageProcessorPil")(**sizes).save_pretrained(path)
    if hub:
        as_on_the_hub(path, image_processor_type=f"{kind}ImageProcessor", resample=1, **sizes)
    return path


def image_processor(path: Path, kind: str, **options: Any) -> Any:
    return getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(path, **options)


class IdeficsReference:
    """Transformers' model and processor of the family called ``kind`` there.

    Args:
        options: fields of the image processor, over those of the checkpoint.
    """

    def __init__(self, path: Path, kind: str, **options: Any) -> None:
        cls = getattr(transformers, f"{kind}ForConditionalGeneration")
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        vision = self.model.config.vision_config
        rows = (vision.image_size // vision.patch_size // self.model.config.scale_factor) ** 2
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        self.processor = transformers.Idefics3Processor(
            image_processor(path, kind, **options), tok, image_seq_len=rows
        )

    def inputs(self, prompt: CasePrompt) -> Inputs:
        # Without its video half, the processor takes a video's text as text.
        count, image = len(prompt.frames), SPECIALS.index("<image>")
        given = VideoMetadata(total_num_frames=count, frames_indices=list(range(count)))
        words = video_text(self.processor, given).replace("<image>", "<|endoftext|>") if count else ""
        text = prompt.text.replace("<video>", words)
        pictures = [list(prompt.pictures)] if prompt.pictures else None
        arguments = dict(self.processor(text=text, images=pictures, return_tensors="pt"))
        if count:
            arguments["input_ids"][arguments["input_ids"] == 0] = image
            frames = self.processor.image_processor(
                [list(prompt.frames)], do_image_splitting=False, return_tensors="pt"
            )
            parts = [frames, arguments] if pictures else [frames]
            if pictures and prompt.text.index("<image>") < prompt.text.index("<video>"):
                parts.reverse()
            for name in ("pixel_values", "pixel_attention_mask"):
                arguments[name] = torch.cat([torch.as_tensor(part[name]) for part in parts], dim=1)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)


#: Numbers of frames as the package num2words writes them, which Transformers' processor needs.
WORDS = {
    1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven",
    8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve", 20: "twenty", 21: "twenty-one",
    64: "sixty-four", 100: "one hundred", 101: "one hundred and one", 128: "one hundred and twenty-eight",
    1000: "one thousand", 1024: "one thousand and twenty-four", 1100: "one thousand, one hundred",
    12345: "twelve thousand, three hundred and forty-five",
}  # fmt: skip


def video_text(processor: Any, metadata: VideoMetadata) -> str:
    """Transformers' text of a video, by the processor's number of rows of a frame."""
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    theirs = SimpleNamespace(
        image_seq_len=processor.image_seq_len,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    inputs = {
        "pixel_values": np.zeros((1, len(metadata.frames_indices))),
        "video_metadata": [metadata],
    }
    with mock.patch.object(module, "num2words", WORDS.__getitem__):
        return module.SmolVLMProcessor.replace_video_token(theirs, inputs, 0)
