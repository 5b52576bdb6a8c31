"""Tiny checkpoints of Muse Glimmer, and Transformers' model and processors of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.video_utils import VideoMetadata

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.families.without_torchvision import WithoutTorchvision, imported
from tests.engine.tiny import TRANSFORMERS, spread, tokenizer

HAS_MUSE_GLIMMER = hasattr(transformers, "MuseGlimmerConfig")
IMAGE, VIDEO = "<|patch|>", "<|video|>"
SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", IMAGE, VIDEO, "<|image_start|>", "<|image_end|>"),
    *("<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>"),
)
FRAME = "<|begin_of_text|>user\n\n{}<|eot|>assistant\n\n"
#: Frames of a video per second.
FPS = 1.5
#: Windows of 2x2 rows.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "layer_types": ["window_attention", "full_attention", "window_attention"],
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 1024,
    "sliding_window": 9,
    "final_logit_softcapping": 6.0,
    "output_multiplier": 0.4,
    "qk_scale_factor": 1.7,
    "post_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
PROCESSOR: dict[str, Any] = {"patch_size": 4, "max_image_tokens": 40}
VIDEO_PROCESSOR: dict[str, Any] = {"patch_size": 4, "max_video_frame_tokens": 12}


def muse_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(
        SPECIALS, bos_token="<|begin_of_text|>", eos_token="<|eot|>", pad_token="<|end_of_text|>"
    )


def make_muse_glimmer(path: Path, hub: bool = False) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones."""
    if not HAS_MUSE_GLIMMER:
        pytest.skip("this release of Transformers has no Muse Glimmer")
    tok = muse_tokenizer()
    config = transformers.MuseGlimmerConfig(
        text_config={**TEXT, "vocab_size": len(tok), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        vision_config=VISION,
        image_token_id=SPECIALS.index(IMAGE),
        video_token_id=SPECIALS.index(VIDEO),
        out_hidden_size=128,
        projector_hidden_size=56,
    )
    model = spread(transformers.MuseGlimmerForConditionalGeneration(config), seed=6)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    processor = {"image_processor_type": "MuseGlimmerImageProcessor", **PROCESSOR}
    video = {"video_processor_type": "MuseGlimmerVideoProcessor", **VIDEO_PROCESSOR}
    stated = {"image_processor": processor, "video_processor": video}
    (path / "processor_config.json").write_text(json.dumps(stated))
    if hub:
        # Transformers reads the kinds of layers from nowhere else.
        written = json.loads((path / "config.json").read_text())
        as_on_the_hub(path, **processor)
        (path / "video_preprocessor_config.json").write_text(json.dumps(video))
        (path / "config.json").write_text(json.dumps(written))
    return path


def _stated(path: Path, kind: str) -> dict[str, Any]:
    """The fields of the processor of ``image`` or ``video``."""
    nested = path / "processor_config.json"
    if nested.is_file():
        return json.loads(nested.read_text())[f"{kind}_processor"]
    prefix = "" if kind == "image" else "video_"
    return json.loads((path / f"{prefix}preprocessor_config.json").read_text())


class _Resized(WithoutTorchvision):
    """Resizes videos frame by frame."""

    def resize(self, image: torch.Tensor, size: Any, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        frames = super().resize(image.flatten(0, -4), size, resample)
        return frames.view(*image.shape[:-2], *frames.shape[-2:])


def image_processor_of(path: Path) -> Any:
    """Transformers' image processor of a checkpoint, with Pillow."""
    (images,) = imported("muse_glimmer.image_processing_muse_glimmer")
    both = type("MuseGlimmerImageProcessor", (images.MuseGlimmerImageProcessor, _Resized), {})
    return both(**_stated(path, "image"))


def video_processor_of(path: Path) -> Any:
    """Transformers' video processor of a checkpoint, with Pillow."""
    (videos,) = imported("muse_glimmer.video_processing_muse_glimmer")
    both = type(
        "MuseGlimmerVideoProcessor",
        (videos.MuseGlimmerVideoProcessor, _Resized),
        {"convert_to_rgb": lambda self, video: video},
    )
    return both(**_stated(path, "video"))


def processor_of(path: Path) -> Any:
    """Transformers' processor of a checkpoint."""
    (texts,) = imported("muse_glimmer.processing_muse_glimmer")

    class Processor(texts.MuseGlimmerProcessor):
        """Of classes that don't need torchvision."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
            pass

    tok = PreTrainedTokenizerFast.from_pretrained(path)
    return Processor(image_processor_of(path), video_processor_of(path), tok)


def _correct_positions(model: Any) -> None:
    """Have a model's tower read its table as later releases do, in the order of a turned image."""
    embed = model.model.vision_tower.patch_embedder
    read = embed.forward
    embed.forward = lambda pixels, grid, **options: read(pixels, grid[:, [0, 2, 1]], **options)


class MuseGlimmerReference:
    """Transformers' model and processor.

    Args:
        fps: frames of a video per second.
    """

    def __init__(self, path: Path, fps: float = FPS) -> None:
        self.fps = fps
        cls = transformers.MuseGlimmerForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        if TRANSFORMERS < (5, 24):
            _correct_positions(self.model)
        self.processor = processor_of(path)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        count = len(prompt.frames)
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in prompt.frames] or [0])
        metadata = VideoMetadata(total_num_frames=count, fps=self.fps, frames_indices=list(range(count)))
        made = self.processor(
            text=[prompt.text],
            images=list(prompt.pictures) or None,
            videos=[frames] if count else None,
            do_sample_frames=False,
            video_metadata=[metadata] if count else None,
            return_metadata=True,
            return_tensors="pt",
        )
        arguments = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
