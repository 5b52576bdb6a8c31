"""Tiny checkpoints of GLM-4.1V, GLM-4.6V and GLM-OCR, and Transformers' model and processor of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.video_utils import VideoMetadata

from tests.engine.families import qwen
from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.tiny import rewrite_tensors, split_shards, spread, tokenizer

SPECIALS = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"
FRAME = "<|user|>\n{}<|assistant|>\n"
FPS = 1.5
#: Of an image, which counts as two frames.
SIZE = {"shortest_edge": 512, "longest_edge": 8192}
#: Of GLM-4.5V: all but the first layer have experts.
EXPERTS = {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}


def make_glm(path: Path, hub: bool = False, *, kind: str = "Glm4v") -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones.

    Args:
        kind: the beginning of the class names in Transformers.
    """
    ocr = kind == "GlmOcr"
    tok = tokenizer(SPECIALS, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3] if ocr else [1, 2, 1]}
    text = {
        "model_type": "glm_ocr_text" if ocr else "glm4v_text",
        "vocab_size": len(tok),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {**rope, "partial_rotary_factor": 1.0 if ocr else 0.5},
        "eos_token_id": [0, 1],
        "pad_token_id": 0,
    }
    if ocr:
        text["head_dim"] = 16
    if kind == "Glm4vMoe":
        text |= {**EXPERTS, "model_type": "glm4v_moe_text"}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config={
            "model_type": _VISION_TYPES.get(kind, "glm4v_vision"),
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": 20,
            "patch_size": 4,
            "out_hidden_size": 64,
            "intermediate_size": 48,
        },
        image_token_id=SPECIALS.index("<|image|>"),
        video_token_id=SPECIALS.index("<|video|>"),
        image_start_token_id=SPECIALS.index("<|begin_of_image|>"),
        image_end_token_id=SPECIALS.index("<|end_of_image|>"),
        video_start_token_id=SPECIALS.index("<|begin_of_video|>"),
        video_end_token_id=SPECIALS.index("<|end_of_video|>"),
    )
    model = spread(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed=41)
    model.generation_config.eos_token_id = [0, 1]
    model.save_pretrained(path)
    tok.save_pretrained(path)
    processor = PROCESSORS[kind]
    images = _images(processor)(patch_size=4, size=SIZE)
    stated = {**images.to_dict(), "processor_class": f"{processor}Processor"}
    (path / "preprocessor_config.json").write_text(json.dumps(stated))
    if hub:
        _publish(path, stated, ocr)
    return path


#: The processors that public files name, by the model's class: GLM-4.6V with experts has that of GLM-4.5V.
PROCESSORS = {"Glm4v": "Glm4v", "Glm46V": "Glm46V", "Glm4vMoe": "Glm46V", "GlmOcr": "Glm46V"}
_VISION_TYPES = {"GlmOcr": "glm_ocr_vision", "Glm4vMoe": "glm4v_moe_vision"}


def _publish(path: Path, images: dict[str, Any], ocr: bool) -> None:
    config = json.loads((path / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": {"type": "default", "mrope_section": rope["mrope_section"]},
    }
    config["torch_dtype"] = config.pop("dtype", "float32")
    (path / "config.json").write_text(json.dumps(config))
    (path / "video_preprocessor_config.json").write_text(json.dumps(images))
    if ocr:
        further = "model.language_model.layers.2.input_layernorm.weight"
        rewrite_tensors(path, lambda tensors: {**tensors, further: torch.zeros(64)})
    split_shards(path)


def _images(processor: str) -> Any:
    name = processor.lower()
    module = import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    return getattr(module, f"{processor}ImageProcessorPil")


class GlmReference(qwen.Reference):
    """Transformers' model of ``kind``, and its processor without the video half, which needs torchvision.

    Args:
        processor: the beginning of the processor's class names; usually one of ``PROCESSORS``.
        fps, bounds: as of :class:`tests.engine.families.qwen.Reference`.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        fps: float = FPS,
        bounds: tuple[int, int] | None = None,
        processor: str | None = None,
    ) -> None:
        self.kind, self.fps = kind, fps
        name = processor or PROCESSORS[kind]
        model = getattr(transformers, f"{kind}ForConditionalGeneration")
        self.model = model.from_pretrained(path, dtype=torch.float32).eval()
        self.vision = self.model.config.vision_config
        self.images = self.frames = _images(name).from_pretrained(path)
        if (path / "video_preprocessor_config.json").is_file():
            stated = json.loads((path / "video_preprocessor_config.json").read_text())
            self.frames = _images(name)(**stated)
        if bounds is not None:
            for images in (self.images, self.frames):
                images.size = type(images.size)(shortest_edge=bounds[0], longest_edge=bounds[1])
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        module = import_module(f"transformers.models.{name.lower()}.processing_{name.lower()}")
        whole = getattr(module, f"{name}Processor")
        image_only = type(
            whole.__name__,
            (whole,),
            {"get_attributes": classmethod(lambda c: ["image_processor", "tokenizer"])},
        )
        # The processor's constructor passes its video half by position.
        self.processor = object.__new__(image_only)
        self.processor.image_processor, self.processor.tokenizer = self.images, self.tokenizer
        self.processor.image_token, self.processor.video_token = "<|image|>", "<|video|>"

    def inputs(self, prompt: CasePrompt) -> Inputs:
        """The steps of a video are given as images: the class takes no video beside an image, for it counts
        the rows of both as those of images. It computes both alike."""
        text, patches, grids, images = "", list[torch.Tensor](), list[list[int]](), iter(prompt.pictures)
        for piece in re.split(r"(<\|image\|>|<\|video\|>)", prompt.text):
            if piece == "<|image|>":
                made = self.images([next(images)], return_tensors="pt")
                rows = {"image_grid_thw": torch.as_tensor(made["image_grid_thw"])}
                piece = self.processor.replace_image_token(rows, 0)
                patches.append(torch.as_tensor(made["pixel_values"]))
                grids += rows["image_grid_thw"].tolist()
            elif piece == "<|video|>":
                of_video, ((steps, height, width),) = self.video(prompt.frames)
                piece = self.placeholder(len(prompt.frames), [int(steps), int(height), int(width)], self.fps)
                patches.append(of_video)
                grids += [[1, int(height), int(width)]] * int(steps)
            text += piece
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if grids:
            arguments["mm_token_type_ids"] = (ids == SPECIALS.index("<|image|>")).long()
            arguments |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
        return Inputs(ids[0].tolist(), self.model, arguments)

    def placeholder(
        self, count: int, grid: Sequence[int], fps: float, metadata: VideoMetadata | None = None
    ) -> str:
        merge, temporal = self.vision.spatial_merge_size, self.vision.temporal_patch_size
        self.processor.video_processor = SimpleNamespace(merge_size=merge, temporal_patch_size=temporal)
        metadata = metadata or VideoMetadata(
            total_num_frames=count, fps=fps, frames_indices=list(range(count))
        )
        inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
        return self.processor.replace_video_token(inputs, 0)

    def frame_size(self, count: int, width: int, height: int) -> tuple[int, int]:
        module = import_module("transformers.models.glm4v.image_processing_pil_glm4v")
        bounds, temporal = self.frames.size, self.vision.temporal_patch_size
        factor = self.vision.patch_size * self.vision.spatial_merge_size
        height, width = module.smart_resize(
            max(count, temporal),
            height,
            width,
            temporal,
            factor,
            bounds["shortest_edge"],
            bounds["longest_edge"],
        )
        return width, height
