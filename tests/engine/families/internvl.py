"""Tiny checkpoints of InternVL and Qianfan-OCR, and Transformers' processing of their images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.got_ocr2 import image_processor as got_image_processor
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import TEXT_SIZES, rewrite_tensors, spread, tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
SIDE, PATCH, ROWS = 24, 6, 4
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_SIZE = {"height": SIDE, "width": SIDE}


def make_internvl(
    path: Path,
    hub: bool = False,
    *,
    kind: str = "InternVL",
    text: str = "qwen2",
    layer: int = -1,
    **tower: Any,
) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones.

    Args:
        kind: the beginning of the class names in Transformers.
        text: the decoder's ``model_type``.
        layer: ``vision_feature_layer``.
        tower: further fields of the tower's configuration.
    """
    tok = tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=TOKENS)
    config = getattr(transformers, f"{kind}Config")(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "attention_bias": True,
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
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
        image_token_id=SPECIALS.index("<IMG_CONTEXT>"),
        image_seq_length=ROWS,
        vision_feature_layer=layer,
        tie_word_embeddings=hub,
    )
    model = spread(
        getattr(transformers, f"{kind}ForConditionalGeneration")(config),
        seed=23,
        embedding_std=0.05 if hub else 1.0,
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = got_image_processor()(size=_SIZE, max_patches=6)
    images.save_pretrained(path)
    if hub:
        # Transformers takes the decoder's layers for the tower's when it saves a Qianfan-OCR.
        rewrite_tensors(
            path, lambda made: {n.replace("model.model.encoder.", "model.model."): t for n, t in made.items()}
        )
        as_on_the_hub(path, **images.to_dict())
    return path


class InternVLReference:
    """Transformers' model, and its processor without the video half, which needs torchvision.

    Args:
        kind: as of :func:`make_internvl`.
        options: of the images' processor.
    """

    def __init__(self, path: Path, kind: str = "InternVL", **options: Any) -> None:
        self.options = options
        cls = getattr(transformers, f"{kind}ForConditionalGeneration")
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = self.processor_of(path, kind)

    @staticmethod
    def processor_of(path: Path, kind: str = "InternVL") -> Any:
        processor = getattr(transformers, f"{kind}Processor")
        image_only = type(
            processor.__name__,
            (processor,),
            {"get_attributes": classmethod(lambda c: ["image_processor", "tokenizer"])},
        )
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        images = got_image_processor().from_pretrained(path)
        config = transformers.AutoConfig.from_pretrained(path)
        tower = config.vision_config
        side = int(tower.image_size[0] // tower.patch_size[0] * config.downsample_ratio)
        return image_only(images, tok, image_seq_length=side * side)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        if not prompt.frames:
            return self._of_images(prompt)
        # Without its video half, the processor takes a video's text as text.
        frames = self.processor.replace_video_token(
            {"pixel_values_videos": [np.zeros(len(prompt.frames))]}, 0
        )
        stand_in = frames.replace("<IMG_CONTEXT>", "<|endoftext|>")
        text = prompt.text.replace("<video>", stand_in)
        pictures = list(prompt.pictures) or None
        arguments = dict(self.processor(text=text, images=pictures, return_tensors="pt", **self.options))
        arguments["input_ids"][arguments["input_ids"] == 0] = SPECIALS.index("<IMG_CONTEXT>")
        pixels = [self.video(prompt.frames)]
        if pictures:
            before = prompt.text.index("<video>") < prompt.text.index("<IMG_CONTEXT>")
            pixels.insert(1 if before else 0, torch.as_tensor(arguments["pixel_values"]))
        arguments["pixel_values"] = torch.cat(pixels)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)

    def _of_images(self, prompt: CasePrompt) -> Inputs:
        pictures = list(prompt.pictures) or None
        made = self.processor(text=[prompt.text], images=pictures, return_tensors="pt", **self.options)
        arguments = dict(made)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)

    def video(self, frames: Sequence[Image.Image]) -> torch.Tensor:
        images = self.processor.image_processor
        made = images(list(frames), crop_to_patches=False, return_tensors="pt")
        return torch.as_tensor(made["pixel_values"])
