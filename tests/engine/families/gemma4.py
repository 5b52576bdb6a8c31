"""Tiny checkpoints of Gemma 4, and Transformers' model and processing of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.video_utils import VideoMetadata

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.without_torchvision import imported
from tests.engine.tiny import rewrite_tensors, split_shards, spread, tokenizer

SPECIALS = ("<pad>", "<eos>", "<bos>", "<|image>", "<image|>", "<|image|>", "<|video|>", "<|turn>", "<turn|>")
TOKENS = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
IMAGE, VIDEO = "<|image|>", "<|video|>"
#: Fields of config.json.
MEDIA_TOKENS = {
    "image_token_id": SPECIALS.index(IMAGE),
    "video_token_id": SPECIALS.index(VIDEO),
    "boi_token_id": SPECIALS.index("<|image>"),
    "eoi_token_id": SPECIALS.index("<image|>"),
}
FRAME = "<bos><|turn>user\n{}<turn|>\n<|turn>model\n"
PATCH, SIDE = 4, 2
#: Most rows of an image and of a frame.
ROWS, FRAME_ROWS = 12, 6
LAYERS = ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention")
_RATE = 24.0

#: Fields of all text models.
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "sliding_window": 11,
    "final_logit_softcapping": 4.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
#: As E2B: layers that borrow keys and values, wider MLPs in them, and inputs of each layer.
SMALL: dict[str, Any] = {
    "layer_types": [*LAYERS, "sliding_attention", "full_attention"],
    "num_hidden_layers": 7,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
}
#: As 31B: keys that are values, and images that attend both ways where layers have a window.
LARGE: dict[str, Any] = {
    "layer_types": list(LAYERS),
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
}


#: As 26B: experts beside the MLP of each layer.
EXPERTS: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 24,
}


def gemma4_tokenizer() -> Any:
    return tokenizer(
        SPECIALS, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=TOKENS
    )


def make_gemma4(path: Path, hub: bool = False, *, large: bool = False) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones; large public ones with
    experts."""
    tok = gemma4_tokenizer()
    text = {
        **TEXT,
        "vocab_size": len(tok) + 3,
        "vocab_size_per_layer_input": len(tok) + 3,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000.0,
            },
        },
        **(LARGE if large else SMALL),
        **(EXPERTS if large and hub else {}),
    }
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": PATCH,
            "pooling_kernel_size": SIDE,
            "position_embedding_size": 300,
            "use_clipped_linears": not large,
            "standardize": large,
        },
        audio_config=None,
        **MEDIA_TOKENS,
        audio_token_id=len(tok) + 1,
    )
    model = transformers.Gemma4ForConditionalGeneration(config)
    spread(model, seed=17, embedding_std=0.05)
    draw_gemma4_buffers(model, 0.5 if large else 0.25)
    save_gemma4(path, model, tok, "Gemma4")
    if hub:
        _publish(path, text)
    return path


def save_gemma4(path: Path, model: Any, tok: Any, name: str) -> None:
    """Save a model, its tokenizer and the file of both processors, whose classes begin with ``name``."""
    model.generation_config.eos_token_id = [1, SPECIALS.index("<turn|>")]
    model.save_pretrained(path)
    tok.save_pretrained(path)
    sizes = {"patch_size": PATCH, "pooling_kernel_size": SIDE}
    stated = {
        "processor_class": f"{name}Processor",
        "image_processor": {
            "image_processor_type": f"{name}ImageProcessor",
            "max_soft_tokens": ROWS,
            **sizes,
        },
        "video_processor": {
            "video_processor_type": f"{name}VideoProcessor",
            "max_soft_tokens": FRAME_ROWS,
            **sizes,
        },
    }
    (path / "processor_config.json").write_text(json.dumps(stated))


def draw_gemma4_buffers(model: torch.nn.Module, scores: float) -> None:
    """Draw what Transformers doesn't count among the parameters, and multiply the scores of attention.

    They have no scale: at 1 a token sees little but one other, which is another one in bfloat16.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            noise = torch.rand(buffer.shape, generator=generator)
            if name.endswith(("layer_scalar", "std_scale")):
                buffer.copy_(0.7 + 0.6 * noise)
            elif name.endswith("std_bias"):
                buffer.copy_(noise - 0.5)
            elif name.endswith(("_min", "_max")):
                buffer.copy_((1 + noise) * (1 if name.endswith("_max") else -1))
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.mul_(scores)


def _publish(path: Path, text: dict[str, Any]) -> None:
    """Heads of layers as public files state them, tensors of borrowing layers, and some of audio."""
    config = json.loads((path / "config.json").read_text())
    state_heads(config["text_config"], text)
    (path / "config.json").write_text(json.dumps(config))

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        layer = f"model.language_model.layers.{text['num_hidden_layers'] - 1}.self_attn."
        unused = (
            [layer + "k_proj.weight", layer + "k_norm.weight"] if text.get("num_kv_shared_layers") else []
        )
        return {**tensors, **{name: torch.ones(4) for name in [*unused, "model.audio_tower.norm.weight"]}}

    rewrite_tensors(path, add)
    split_shards(path)


def state_heads(stated: dict[str, Any], text: dict[str, Any]) -> None:
    """State the heads of layers as public files do.

    Args:
        stated: ``text_config`` as Transformers has saved it.
        text: the fields that it was made of.
    """
    stated.pop("per_layer_config", None)
    for field in ("global_head_dim", "num_global_key_value_heads"):
        stated[field] = text.get(field)


class Gemma4Reference:
    """Transformers' model and its processing of images. Frames of a video are processed as images: the video
    half needs torchvision.

    Args:
        options: of both processors.
    """

    architecture = "Gemma4ForConditionalGeneration"

    def __init__(self, path: Path, **options: Any) -> None:
        cls = getattr(transformers, self.architecture)
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        stated = json.loads((path / "processor_config.json").read_text())
        module, texts = imported("gemma4.image_processing_pil_gemma4", "gemma4.processing_gemma4")
        # The class takes no other numbers than those of the public models.
        module._SUPPORTED_SOFT_TOKENS = range(1, 1121)
        images, frames = ({**stated[f"{kind}_processor"], **options} for kind in ("image", "video"))
        self.images = module.Gemma4ImageProcessorPil(**images)
        self.frames = module.Gemma4ImageProcessorPil(**{"do_normalize": True, **frames})
        # The constructor wants a video processor.
        self.processor = object.__new__(texts.Gemma4Processor)
        for name, value in {**TOKENS, "video_token": VIDEO}.items():
            setattr(self.processor, name, value)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        """The frames of a video are given as images: the model computes both alike."""
        text, made, images = "", list[dict[str, torch.Tensor]](), iter(prompt.pictures)
        for piece in re.split(r"(<\|image\|>|<\|video\|>)", prompt.text):
            if piece == IMAGE:
                made.append(self.prepared(self.images, next(images)))
                piece = self.processor.replace_image_token(made[-1], 0)
            elif piece == VIDEO:
                of_frames = [self.prepared(self.frames, frame) for frame in prompt.frames]
                made += of_frames
                piece = self.placeholder(of_frames[0]["num_soft_tokens_per_image"][0], prompt.frames)
            text += piece
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        row, video = self.model.config.image_token_id, self.model.config.video_token_id
        given = torch.where(ids == video, row, ids)
        arguments = {"input_ids": given, "attention_mask": torch.ones_like(ids)}
        if made:
            arguments["mm_token_type_ids"] = (given == row).long()
            arguments |= _padded(made)
        return Inputs(ids[0].tolist(), self.model, arguments)

    def prepared(self, processor: Any, image: Image.Image) -> dict[str, torch.Tensor]:
        """An image as the model takes it, in a batch of its own."""
        return processor([image], return_tensors="pt")

    def placeholder(
        self, rows: Any, frames: Sequence[Image.Image], metadata: VideoMetadata | None = None
    ) -> str:
        count = len(frames)
        metadata = metadata or VideoMetadata(
            total_num_frames=count, fps=_RATE, frames_indices=list(range(count))
        )
        inputs = {"num_soft_tokens_per_video": [int(rows)], "video_metadata": [metadata]}
        return self.processor.replace_video_token(inputs, 0)


def _padded(made: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Images of processors with other budgets as one batch."""
    most = max(part["pixel_values"].shape[1] for part in made)
    pixels, places = [], []
    for part in made:
        missing = most - part["pixel_values"].shape[1]
        pixels.append(torch.nn.functional.pad(part["pixel_values"], (0, 0, 0, missing)))
        places.append(torch.nn.functional.pad(part["image_position_ids"], (0, 0, 0, missing), value=-1))
    return {"pixel_values": torch.cat(pixels), "image_position_ids": torch.cat(places)}
