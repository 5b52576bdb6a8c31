"""Tiny checkpoints of MiniCPM-V 4.6 and 4.7 and of MiniCPM-OCR, and Transformers' classes of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.families.without_torchvision import WithoutTorchvision, imported
from tests.engine.tiny import QWEN3_5_TEXT, TRANSFORMERS, spread, tokenizer

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
MARKS = {
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE, VIDEO, *MARKS.values())
#: Images and slices of about 24 by 24 pixels, in patches of 3 of which 4 by 4 are one row.
PROCESSOR: dict[str, Any] = {"patch_size": 3, "scale_resolution": 24, "max_slice_nums": 6}
#: Frames likewise, with fewer slices.
VIDEO_PROCESSOR: dict[str, Any] = {"patch_size": 3, "scale_resolution": 24, "max_slice_nums": 2}
#: MiniCPM-OCR, in place of a version.
OCR = 0
STEMS = {6: "MiniCPMV4_6", 7: "MiniCPMV4_7", OCR: "MiniCPMOcr"}
PACKAGES = {6: "minicpmv4_6", 7: "minicpmv4_7", OCR: "minicpm_ocr"}


def make_tokenizer() -> Any:
    named = {"image_token": IMAGE, "video_token": VIDEO, **MARKS}
    return tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named)


def canvas_ids(tok: Any) -> dict[str, int]:
    """The fields of version 4.7 that name the tokens around images and slices."""
    names = ("image_start", "image_end", "slice_start", "slice_end")
    ids = {f"{name}_id": SPECIALS.index(MARKS[f"{name}_token"]) for name in names}
    (newline,) = tok("\n").input_ids
    return {**ids, "newline_id": newline}


def make_minicpm_v4_6(path: Path, hub: bool, version: int = 6) -> Path:
    """A checkpoint with a table of 7x7 positions.

    Args:
        hub: tied embeddings, several shards, images without numbers, in the mode that keeps four times as
            many rows. MiniCPM-OCR's files leave out what is usual there; otherwise small images stay small.
        version: a key of ``STEMS``.
    """
    mode = "4x" if hub else "16x"
    tok = make_tokenizer()
    if TRANSFORMERS < (5, 23):
        pytest.skip("these releases fail for images of several sizes, and slice them otherwise")
    config = getattr(transformers, f"{STEMS[version]}Config")(
        text_config={
            "model_type": "qwen3_5_text",
            **QWEN3_5_TEXT,
            "vocab_size": len(tok),
            "max_position_embeddings": 1024,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 22,
            "patch_size": 3,
        },
        insert_layer_id=1,
        image_token_id=SPECIALS.index(IMAGE),
        video_token_id=SPECIALS.index(VIDEO),
        downsample_mode=mode,
        tie_word_embeddings=hub,
        **(canvas_ids(tok) if version == 7 else {}),
    )
    model = getattr(transformers, f"{STEMS[version]}ForConditionalGeneration")(config)
    spread(model, seed=8, embedding_std=0.05 if hub else 1.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    processor = {"image_processor_type": "MiniCPMV4_6ImageProcessor", "downsample_mode": mode, **PROCESSOR}
    processor["use_image_id"] = not hub
    if version == OCR:
        processor["image_processor_type"] = "MiniCPMOcrImageProcessor"
        processor["small_image_upsize"] = "never"
    video = {"video_processor_type": "MiniCPMV4_6VideoProcessor", "downsample_mode": mode, **VIDEO_PROCESSOR}
    if version == OCR and hub:
        for stated in (processor, video):
            del stated["downsample_mode"]
        del processor["small_image_upsize"]
    halves = {"image_processor": processor, "video_processor": video}
    (path / "processor_config.json").write_text(json.dumps(halves))
    if hub:
        config_json = json.loads((path / "config.json").read_text())
        if version == OCR:
            del config_json["downsample_mode"], config_json["tie_word_embeddings"]
        as_on_the_hub(path, **processor)
        (path / "video_preprocessor_config.json").write_text(json.dumps(video))
        (path / "config.json").write_text(json.dumps(config_json))
    return path


def image_options(path: Path) -> dict[str, Any]:
    """The fields of a checkpoint's image processor."""
    nested = path / "processor_config.json"
    if nested.exists():
        return json.loads(nested.read_text())["image_processor"]
    return json.loads((path / "preprocessor_config.json").read_text())


def video_options(path: Path) -> dict[str, Any]:
    """The fields of a checkpoint's video processor; those of the image processor if no file states them."""
    nested, file = path / "processor_config.json", path / "video_preprocessor_config.json"
    stated = json.loads(nested.read_text()).get("video_processor") if nested.exists() else None
    if stated is None and file.exists():
        stated = json.loads(file.read_text())
    return image_options(path) if stated is None else stated


def pil_processor(options: dict[str, Any], version: int = 6) -> Any:
    """Transformers' processor of images with the fields ``options``; those of videos alone change nothing."""
    if version == OCR:
        (images,) = imported("minicpm_ocr.image_processing_minicpm_ocr")
        both = type("MiniCPMOcrImageProcessor", (images.MiniCPMOcrImageProcessor, WithoutTorchvision), {})
        return both(**options)
    pil = importlib.import_module("transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6")
    return pil.MiniCPMV4_6ImageProcessorPil(**options)


def processor_of(path: Path, version: int = 6, **options: Any) -> Any:
    """Transformers' processor of a checkpoint without its video half, which needs torchvision.

    Args:
        options: fields of the image processor, over those of the checkpoint.
    """
    (module,) = imported(f"{PACKAGES[version]}.processing_{PACKAGES[version]}")
    whole = getattr(module, f"{STEMS[version]}Processor")
    made = pil_processor(image_options(path) | options, version)
    mode = video_options(path).get("slice_mode", True)

    def create(self: Any, image_processor: Any, tokenizer: Any) -> None:
        self.video_processor = SimpleNamespace(slice_mode=mode, downsample_mode=made.downsample_mode)
        whole.__init__(self, image_processor, self.video_processor, tokenizer)

    parts = classmethod(lambda cls: ["image_processor", "video_processor", "tokenizer"])
    check = {"check_argument_for_proper_class": lambda self, name, value: None}
    image_only = type(whole.__name__, (whole,), {"__init__": create, "get_attributes": parts, **check})
    return image_only(made, transformers.PreTrainedTokenizerFast.from_pretrained(path))


class MiniCPMV46Reference:
    """Transformers' model and processor.

    Args:
        version: a key of ``STEMS``.
        options: of the image processor.
    """

    def __init__(self, path: Path, version: int = 6, **options: Any) -> None:
        cls = getattr(transformers, f"{STEMS[version]}ForConditionalGeneration")
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = processor_of(path, version, **options)
        # Frames of MiniCPM-OCR are never left small.
        of_frames = {**video_options(path), **options, "small_image_upsize": "always"}
        self.of_frames = pil_processor(of_frames, version)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        text, videos = prompt.text, {}
        if prompt.frames:
            videos, words = self.video(prompt.frames)
            # Without its video half, the processor takes a video's text as text.
            text = text.replace(VIDEO, words.replace(VIDEO, SPECIALS[0]))
        pictures = [list(prompt.pictures)] if prompt.pictures else None
        made = self.processor(text=[text], images=pictures, return_tensors="pt")
        arguments = {name: torch.as_tensor(value) for name, value in made.items()} | videos
        if videos:
            ids = arguments["input_ids"]
            ids[ids == 0] = SPECIALS.index(VIDEO)
            if "mm_token_type_ids" in arguments:
                arguments["mm_token_type_ids"][ids == SPECIALS.index(VIDEO)] = 2
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)

    def video(self, frames: Sequence[Image.Image]) -> tuple[dict[str, torch.Tensor], str]:
        """The model's arguments for a video, and the text that stands for it.

        A frame is prepared as an image by the video processor's options, which needs no torchvision.
        """
        made = self.of_frames([list(frames)], return_tensors="pt")
        sizes, grids = torch.as_tensor(made["target_sizes"]), torch.as_tensor(made["grids"])
        inputs = {"target_sizes_videos": sizes, "num_frames_per_video": [len(frames)], "grids_videos": grids}
        divisor = self.processor.video_token_divisor
        words = self.processor.replace_video_token(inputs, 0, video_token_divisor=divisor)
        if self.processor.default_use_image_id:
            # Version 7 leaves videos as they are.
            (words,) = self.processor._prepend_local_ids([VIDEO], [words], VIDEO)
        return {"pixel_values_videos": made["pixel_values"], "target_sizes_videos": sizes}, words
