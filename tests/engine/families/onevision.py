"""Tiny checkpoints of LLaVA-OneVision, and what Transformers makes of their images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub, under_vision_model
from tests.engine.tiny import rewrite_tensors, spread, tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
# 5 patches of 6 pixels per side, and 2 pixels that no patch covers: halved sides are rounded up.
SIDE, PATCH = 32, 6
PINPOINTS = [[a * SIDE, b * SIDE] for a in (1, 2, 3) for b in (1, 2, 3)]


def make_onevision(path: Path, hub: bool = False) -> Path:
    """A checkpoint of which 2 of the tower's 3 layers are used, and images of up to 3x3 tiles show 4.

    Args:
        hub: write it as the public ones are, with tied embeddings as the smallest of them has.
    """
    tok = tokenizer(
        SPECIALS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=transformers.Qwen2Config(
            vocab_size=len(tok),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=hub,
        ),
        image_token_index=SPECIALS.index("<image>"),
        video_token_index=SPECIALS.index("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=hub,
    )
    model = spread(
        transformers.LlavaOnevisionForConditionalGeneration(config), embedding_std=0.05 if hub else 1.0
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    size = {"height": SIDE, "width": SIDE}
    transformers.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS).save_pretrained(
        path
    )
    if hub:
        rewrite_tensors(path, under_vision_model)
        as_on_the_hub(
            path,
            image_processor_type="LlavaOnevisionImageProcessor",
            processor_class="LlavaOnevisionProcessor",
            size=size,
            image_grid_pinpoints=PINPOINTS,
            resample=3,
        )
    return path


class OnevisionReference:
    """Transformers' model, and its processor without the video half, which needs torchvision."""

    def __init__(self, path: Path) -> None:
        cls = transformers.LlavaOnevisionForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.images = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(path)
        vision = self.model.config.vision_config
        self.side, self.grid = vision.image_size, vision.image_size // vision.patch_size
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        processor = transformers.LlavaOnevisionProcessor
        image_only = type(
            processor.__name__,
            (processor,),
            {"get_attributes": classmethod(lambda c: ["image_processor", "tokenizer"])},
        )
        self.processor = image_only(
            self.images,
            self.tokenizer,
            num_image_tokens=self.grid**2,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )

    def inputs(self, prompt: CasePrompt) -> Inputs:
        rows = "<video>" * (len(prompt.frames) * (-(-self.grid // 2)) ** 2 + 1)
        # The processor refuses placeholders of videos that it isn't given: another special token stands in.
        text = prompt.text.replace("<video>", rows.replace("<video>", "<|endoftext|>"))
        # Transformers' chats nest the images of a conversation: several are then shown in one crop each.
        pictures = [list(prompt.pictures)] if prompt.pictures else None
        arguments = dict(self.processor(text=text, images=pictures, return_tensors="pt"))
        if prompt.frames:
            arguments["input_ids"][arguments["input_ids"] == 0] = SPECIALS.index("<video>")
            arguments["pixel_values_videos"] = self.video(prompt.frames)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)

    def video(self, frames: Sequence[Image.Image]) -> torch.Tensor:
        resample, size = Image.Resampling(int(self.images.resample)), (self.side, self.side)
        resized = [np.asarray(frame.resize(size, resample)) for frame in frames]
        values = resized
        if self.images.do_rescale:
            values = [pixels * self.images.rescale_factor for pixels in values]
        if self.images.do_normalize:
            values = [(pixels - self.images.image_mean) / self.images.image_std for pixels in values]
        return torch.tensor(np.stack(values), dtype=torch.float32).permute(0, 3, 1, 2)[None]
