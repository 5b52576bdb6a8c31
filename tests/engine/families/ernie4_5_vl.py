"""A tiny ERNIE 4.5 VL checkpoint, and Transformers' model and processor of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageFont
from transformers import PreTrainedTokenizerFast
from transformers.video_utils import VideoMetadata

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.without_torchvision import imported
from tests.engine.tiny import rewrite_json, split_shards, spread, tokenizer

ARCHITECTURES = tuple(f"Ernie4_5_{name}ForConditionalGeneration" for name in ("VLMoe", "VL_Moe"))
PATCH, FPS, FONT = 4, 1.5, "Letters.ttf"
TOKENS = {
    f"{kind}{part}_token": f"<|{kind.upper()}_{name}|>"
    for kind in ("image", "video")
    for part, name in (("", "PLACEHOLDER"), ("_start", "START"), ("_end", "END"))
}
SPECIALS = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", *TOKENS.values())
IMAGE = "Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
VIDEO = "Video 1:<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
FRAME = "<|begin_of_sentence|>User: {}\nAssistant: "
IMAGES = {"shortest_edge": 256, "longest_edge": 4096}
VIDEOS = {"shortest_edge": 300, "longest_edge": 2048}


def ernie_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(
        SPECIALS, bos_token="<s>", eos_token="</s>", pad_token="<unk>", extra_special_tokens=TOKENS
    )


def make_ernie4_5_vl(path: Path, hub: bool = False) -> Path:
    """A checkpoint whose tensors have the public names, as Transformers saves them.

    Args:
        hub: embeddings are tied, the options of both processors stand in one file, and there are several
            shards.
    """
    tok = ernie_tokenizer()
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config={
            "vocab_size": len(tok),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "moe_k": 3,
            "moe_num_experts": 6,
            "moe_num_shared_experts": 2,
            # Experts have another number of inputs than of outputs, and text other ones than images.
            "moe_intermediate_size": [24, 16],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
            "eos_token_id": 2,
            "tie_word_embeddings": hub,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
        },
        tie_word_embeddings=hub,
        **{f"{name}_id": tok.convert_tokens_to_ids(token) for name, token in TOKENS.items()},
    )
    model = transformers.Ernie4_5_VLMoeForConditionalGeneration(config)
    spread(model, seed=3, embedding_std=0.05 if hub else 1.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    # What Transformers calls it, and what its first releases did.
    rewrite_json(path / "config.json", {"architectures": list(ARCHITECTURES)})
    images = image_processor()(patch_size=PATCH, size=IMAGES).to_dict()
    videos = {"size": VIDEOS, "patch_size": PATCH, "font": FONT, "draw_on_frames": True}
    if hub:
        stated = {"image_processor": images, "video_processor": videos}
        (path / "processor_config.json").write_text(json.dumps(stated))
        split_shards(path)
    else:
        (path / "preprocessor_config.json").write_text(json.dumps(images))
        (path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    (path / FONT).write_bytes(font())
    return path


def font() -> bytes:
    """A font file, of Pillow's own letters."""
    return ImageFont.load_default(10).path.getvalue()


def image_processor() -> Any:
    """The class, which needs no torchvision."""
    return transformers.Ernie4_5_VLMoeImageProcessorPil


@cache
def video_processor() -> Any:
    """The class; what of it resizes needs torchvision."""
    (module,) = imported("ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe")
    return module.Ernie4_5_VLMoeVideoProcessor


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


class ErnieReference:
    """Transformers' model, and its processor without what of its video half needs torchvision."""

    def __init__(self, path: Path, fps: float = FPS) -> None:
        self.fps = fps
        kind = transformers.Ernie4_5_VLMoeForConditionalGeneration
        self.model = kind.from_pretrained(path, dtype=torch.float32).eval()
        both = _json(path / "processor_config.json")
        self.images, self.frames = (
            image_processor()(**{**(stated or _json(path / file)), "temporal_patch_size": 1})
            for stated, file in (
                (both.get("image_processor"), "preprocessor_config.json"),
                (both.get("video_processor"), "video_preprocessor_config.json"),
            )
        )
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(path, extra_special_tokens=TOKENS)
        self.videos = SimpleNamespace(font=str(path / FONT))
        # The processor's constructor checks its video half.
        self.processor = object.__new__(transformers.Ernie4_5_VLMoeProcessor)
        self.processor.image_processor = self.images
        self.processor.video_processor = SimpleNamespace(
            merge_size=self.frames.merge_size, temporal_patch_size=2
        )
        for name, token in TOKENS.items():
            setattr(self.processor, name, token)
            setattr(self.processor, f"{name}_id", self.tokenizer.convert_tokens_to_ids(token))

    def inputs(self, prompt: CasePrompt) -> Inputs:
        text, pictures = "", iter(prompt.pictures)
        made: dict[str, list[torch.Tensor]] = {}
        for piece in re.split(r"(<\|(?:IMAGE|VIDEO)_PLACEHOLDER\|>)", prompt.text):
            if piece == TOKENS["image_token"]:
                found = self.images([next(pictures)], return_tensors="pt")
                piece = self.processor.replace_image_token(found, 0)
            elif piece == TOKENS["video_token"]:
                patches, grid = self.video(prompt.frames)
                found = {"pixel_values_videos": patches, "video_grid_thw": grid}
                piece = self.processor.replace_video_token(found, 0)
            else:
                found = {}
            for name, value in found.items():
                made.setdefault(name, []).append(torch.as_tensor(value))
            text += piece
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        kinds = (ids == self.processor.image_token_id) + 2 * (ids == self.processor.video_token_id)
        experts = self.processor.create_moe_mm_token_type_ids(ids.tolist())
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kinds,
            "moe_mm_token_type_ids": torch.tensor(experts),
            **{name: torch.cat(values) for name, values in made.items()},
        }
        vision = tuple(self.tokenizer.convert_tokens_to_ids(list(TOKENS.values())))
        return Inputs(ids[0].tolist(), self.model, arguments, vision_ids=vision)

    def video(
        self, frames: Sequence[Image.Image], metadata: VideoMetadata | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and grid of a video."""
        count = len(frames)
        metadata = metadata or VideoMetadata(
            total_num_frames=count, fps=self.fps, frames_indices=list(range(count))
        )
        kind = video_processor()
        stamped = []
        for frame, seconds in zip(frames, metadata.timestamps, strict=True):
            pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
            drawn = kind._render_image_with_timestamp(
                self.videos, pixels, kind._convert_timestamp(None, seconds)
            )
            stamped.append(Image.fromarray(drawn.permute(1, 2, 0).numpy()))
        stamped += stamped[-1:] * (len(stamped) % 2)
        module = import_module(image_processor().__module__)
        width, height = frames[0].size
        side, size = self.frames.patch_size * self.frames.merge_size, self.frames.size
        height, width = module.smart_resize(height, width, side, size["shortest_edge"], size["longest_edge"])
        filter_ = Image.Resampling(int(self.frames.resample))
        resized = [frame.resize((width, height), filter_) for frame in stamped]
        singles = [self.frames(frame, do_resize=False, return_tensors="pt") for frame in resized]
        patches = torch.cat([torch.as_tensor(single["pixel_values"]) for single in singles])
        return patches, torch.tensor([[len(singles), *singles[0]["image_grid_thw"][0, 1:].tolist()]])
