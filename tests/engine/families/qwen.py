"""Tiny checkpoints of the later Qwen-VL families, and what Transformers makes of images and videos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.video_utils import VideoMetadata

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.tiny import (
    QWEN3_5_TEXT,
    QWEN_SPECIALS,
    QWEN_TEMPLATE,
    picture,
    rewrite_json,
    rewrite_tensors,
    soften_experts,
    split_shards,
    spread,
    tokenizer,
)

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
#: Of HyperCLOVA X, whose chat template writes how long a video is.
LASTING_VIDEO = '{"video_duration": <|video_duration|>}\n' + VIDEO
FRAME = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
#: Frames of a video per second, by family where it wants to know. Whole seconds from one pair of frames to
#: the next for Qwen2.5-VL: older releases of Transformers drop fractions of them.
FPS = {
    "Qwen2_5_VL": 1.0,
    "Qwen3VL": 1.5,
    "Qwen3VLMoe": 1.5,
    "Qwen3_5": 1.5,
    "Qwen3_5Moe": 1.5,
    "Lfm3Vl": 1.5,
}
#: Families whose videos have the time of each step among their rows.
HAS_HYPERCLOVAX = hasattr(transformers, "HyperCLOVAXVisionV2Config")
TIMED = ("Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe", "Lfm3Vl")

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}


def make_qwen2_5_vl(
    path: Path,
    *,
    tied: bool = False,
    gqa_ratio: int = 2,
    names: str = "saved",
    seed: int = 0,
    inner: int = 48,
) -> Path:
    """A Qwen2.5-VL checkpoint with windows of 2x2 rows, in all blocks but the second.

    Args:
        names: ``saved`` as Transformers writes it; ``hub`` as the public checkpoints are: flat config.json in
            the old spelling, preprocessor_config.json and several shards; ``memory`` with the tensors named
            as they are in Transformers' model.
        inner: intermediate size of the tower.
    """
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {**_TEXT, "num_hidden_layers": 2, "num_key_value_heads": 4 // gqa_ratio, "rope_parameters": rope}
    vision = {
        **_VISION,
        "intermediate_size": inner,
        "depth": 3,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    save(path, "Qwen2_5_VL", text, vision, tied=tied, seed=seed, options={})
    if names == "hub":
        _flatten(path)
        split_shards(path)
    elif names == "memory":
        rewrite_tensors(path, lambda tensors: {_in_memory(k): value for k, value in tensors.items()})
    return path


def make_exaone4_5(
    path: Path, *, tied: bool = False, gqa_ratio: int = 2, names: str = "saved", seed: int = 0, **tower: Any
) -> Path:
    """An EXAONE 4.5 checkpoint, with a tower as :func:`make_qwen2_5_vl` has it, but one KV head of two.

    Args:
        names: ``saved`` as Transformers writes it; ``hub`` as the first public checkpoint is: another name of
            the decoder, tensors of a head for further tokens, preprocessor_config.json and several shards.
        tower: further fields of the tower's configuration.
    """
    text = {
        **_TEXT,
        "model_type": "exaone4",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4 // gqa_ratio,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    vision = {**_VISION, "num_key_value_heads": 1, "depth": 3, "window_size": 16}
    vision |= {"fullatt_block_indexes": [1], **tower}
    save(path, "Exaone4_5_", text, vision, tied=tied, seed=seed, options={})
    if names == "hub":
        config = json.loads((path / "config.json").read_text())
        config["text_config"]["model_type"] = "exaone4_5_text"
        (path / "config.json").write_text(json.dumps(config))
        processor = {"min_pixels": 256, "max_pixels": 4096, "patch_size": 4, "merge_size": 2}
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
        rewrite_tensors(path, lambda tensors: {**tensors, "mtp.norm.weight": torch.ones(64)})
        split_shards(path)
    return path


def make_hyperclovax(
    path: Path, *, tied: bool = False, gqa_ratio: int = 2, names: str = "saved", seed: int = 0
) -> Path:
    """A HyperCLOVA X checkpoint, with a tower as :func:`make_qwen2_5_vl` has it, and a projection.

    Args:
        names: ``saved`` as Transformers writes it; ``hub`` as the public checkpoint is: its publisher's name
            of the architecture, a decoder within a model, preprocessor_config.json and several shards.
    """
    if not HAS_HYPERCLOVAX:
        pytest.skip("this release of Transformers has no HyperCLOVA X with images")
    text = {
        **_TEXT,
        "model_type": "hyperclovax",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4 // gqa_ratio,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.4,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    vision = {**_VISION, "model_type": "qwen2_5_vl_vision", "out_hidden_size": 40}
    vision |= {"depth": 3, "window_size": 16, "fullatt_block_indexes": [1]}
    save(path, "HyperCLOVAXVisionV2", text, vision, tied=tied, seed=seed, options={})
    published = "HCXVisionV2ForCausalLM"
    both = ["HyperCLOVAXVisionV2ForConditionalGeneration", published]
    rewrite_json(path / "config.json", {"architectures": both})
    if names == "hub":
        config = json.loads((path / "config.json").read_text())
        config |= {"architectures": [published], "model_type": "vlm"}
        config["vision_config"]["model_type"] = "qwen2_5_vl"
        (path / "config.json").write_text(json.dumps(config))
        processor = {"min_pixels": 256, "max_pixels": 4096, "patch_size": 4, "merge_size": 2}
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
        inner = "model.language_model."
        rewrite_tensors(
            path,
            lambda tensors: {
                name if "lm_head" in name else name.replace(inner, inner + "model."): tensor
                for name, tensor in tensors.items()
            },
        )
        split_shards(path)
    return path


def make_qwen3_vl(
    path: Path,
    *,
    tied: bool = False,
    gqa_ratio: int = 2,
    names: str = "saved",
    seed: int = 0,
    words: Sequence[str] = (),
    kind: str = "Qwen3VL",
    **experts: Any,
) -> Path:
    """A Qwen3-VL checkpoint with features from three of four blocks and a table of 6x6 positions.

    Args:
        names: ``saved`` as Transformers writes it; ``hub`` as the public checkpoints are: rotary fields in
            the old spelling, preprocessor_config.json, video_preprocessor_config.json and several shards.
        words: tokens of the tokenizer.
        kind: the beginning of the class names in Transformers.
        experts: fields of the decoder's mixture of experts.
    """
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [5, 4, 3], "mrope_interleaved": True}
    text = {
        **_TEXT,
        "head_dim": 24,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4 // gqa_ratio,
        "rope_parameters": rope,
    }
    vision = {
        **_VISION,
        "depth": 4,
        "num_position_embeddings": 36,
        # Not in the order of the blocks, and not the first ones.
        "deepstack_visual_indexes": [2, 0, 1],
    }
    save(path, kind, {**text, **experts}, vision, tied=tied, seed=seed, options=HALF, words=words)
    if names == "hub":
        rewrite_tensors(path, _transposed_experts)
        config = json.loads((path / "config.json").read_text())
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        (path / "config.json").write_text(json.dumps(config))
        publish_processors(path)
        split_shards(path)
    return path


def make_qwen3_5(
    path: Path,
    *,
    tied: bool = False,
    gqa_ratio: int = 2,
    names: str = "saved",
    seed: int = 0,
    kind: str = "Qwen3_5",
    **experts: Any,
) -> Path:
    """A Qwen3.5 checkpoint: three of four layers have a gated delta net, the heads of the other one rotate in
    part.

    Args:
        kind: the beginning of the class names in Transformers.
        experts: fields of the decoder's mixture of experts.
        names: ``saved`` as Transformers writes it; ``hub`` as the public checkpoints are: no list of layers,
            tensors of a head for further tokens, preprocessor_config.json, video_preprocessor_config.json
            and several shards.
    """
    text = {**_TEXT, **QWEN3_5_TEXT, **experts, "num_key_value_heads": 4 // gqa_ratio}
    if experts:
        del text["intermediate_size"]
    vision = {**_VISION, "depth": 2, "num_position_embeddings": 36}
    save(path, kind, text, vision, tied=tied, seed=seed, options=HALF)
    if experts:
        soften_experts(path)
    if names == "hub":
        config = json.loads((path / "config.json").read_text())
        del config["text_config"]["layer_types"]
        config["text_config"]["full_attention_interval"] = 4
        config["vision_config"]["deepstack_visual_indexes"] = []
        (path / "config.json").write_text(json.dumps(config))
        publish_processors(path)
        rewrite_tensors(path, lambda tensors: {**_together(tensors), "mtp.norm.weight": torch.ones(64)})
        split_shards(path)
    return path


def make_qwen3_5_moe(path: Path, **options: Any) -> Path:
    """The same with experts in all layers, and a shared one; options as for :func:`make_qwen3_5`.

    Public checkpoints hold a matrix of all experts in one tensor; Transformers saves a tensor for each.
    """
    experts = {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    }
    return make_qwen3_5(path, kind="Qwen3_5Moe", **{"seed": 3, **experts, **options})


def _together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join the matrices of all experts of a layer."""
    found = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for prefix in {name.split("experts.")[0] + "experts." for name in tensors if ".mlp.experts." in name}:
        count = len({name.split(".")[-3] for name in tensors if name.startswith(prefix)})
        gates, ups, downs = (
            torch.stack([tensors[f"{prefix}{expert}.{kind}_proj.weight"] for expert in range(count)])
            for kind in ("gate", "up", "down")
        )
        found |= {f"{prefix}gate_up_proj": torch.cat((gates, ups), 1), f"{prefix}down_proj": downs}
    return found


def publish_processors(path: Path) -> None:
    """Write a file for images and one for videos, as beside the public checkpoints of Qwen3-VL."""
    processor = {"size": {"shortest_edge": 256, "longest_edge": 4096}, "patch_size": 4, "merge_size": 2}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (path / file).write_text(json.dumps({**processor, **HALF}))


def make_qwen3_vl_moe(path: Path, **options: Any) -> Path:
    """The same with experts in all layers but the third; options as for :func:`make_qwen3_vl`.

    Public checkpoints have the experts' matrices transposed.
    """
    experts = {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [2],
    }
    return make_qwen3_vl(path, kind="Qwen3VLMoe", **{"seed": 4, **experts, **options})


def _transposed_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
        for name, tensor in tensors.items()
    }


def save(
    path: Path,
    kind: str,
    text: dict,
    vision: dict,
    *,
    tied: bool,
    seed: int,
    options: dict[str, Any],
    words: Sequence[str] = (),
    **beside: Any,
) -> None:
    """Write a checkpoint as Transformers' classes save it whose names begin with ``kind``.

    Args:
        text, vision: fields of the decoder and of the tower.
        options: of the image processor.
        beside: further fields of config.json.
    """
    tok = tokenizer(QWEN_SPECIALS, words=words, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tok.chat_template = QWEN_TEMPLATE
    ids = {name: tok.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end")}
    special_names = ("image_pad", "video_pad", "vision_start", "vision_end")
    config = getattr(transformers, f"{kind}Config")(
        text_config={
            **text,
            "vocab_size": len(tok),
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
            "tie_word_embeddings": tied,
        },
        vision_config=vision,
        **beside,
        tie_word_embeddings=tied,
        **{
            f"{name.removesuffix('_pad')}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>")
            for name in special_names
        },
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    spread(model, seed=seed, embedding_std=0.05 if tied else 1.0)
    model.generation_config.eos_token_id = [ids["im_end"], ids["endoftext"]]
    model.save_pretrained(path)
    tok.save_pretrained(path)
    transformers.Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 256, "longest_edge": 4096},
        **options,
    ).save_pretrained(path)


def _flatten(path: Path) -> None:
    """config.json and the processor's as they are on the hub."""
    config = json.loads((path / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    for key in ("dtype", "model_type", "layer_types"):
        text.pop(key, None)
    config.update(text, rope_theta=rope["rope_theta"])
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["sliding_window"], config["use_sliding_window"] = 32768, False
    vision["in_chans"] = vision.pop("in_channels", 3)
    (path / "config.json").write_text(json.dumps(config))
    processor = {"min_pixels": 256, "max_pixels": 4096, "patch_size": 4, "merge_size": 2}
    processor |= {"temporal_patch_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))


def _in_memory(name: str) -> str:
    for old, new in (("visual.", "model.visual."), ("model.", "model.language_model.")):
        if name.startswith(old):
            return name.replace(old, new, 1)
    return name


def _stated_size(path: Path) -> dict[str, int]:
    file = path / "processor_config.json"
    if file.is_file():
        return json.loads(file.read_text())["image_processor"]["size"]
    return json.loads((path / "preprocessor_config.json").read_text())["size"]


class Reference:
    """Transformers' model and processor of a checkpoint of the family called ``kind`` there.

    Args:
        fps: frames of a video per second; those of ``FPS`` if not given.
        bounds: least and greatest area of an image and of a video's frame; the checkpoint's if not given.
    """

    def __init__(
        self, path: Path, kind: str, fps: float | None = None, bounds: tuple[int, int] | None = None
    ) -> None:
        self.kind, self.fps = kind, fps or FPS.get(kind, 1.0)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")
        self.model = model.from_pretrained(path, dtype=torch.float32).eval()
        self.vision = self.model.config.vision_config
        self.images = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
        self.frames = self.images
        if kind in TIMED and self.images.size != (size := _stated_size(path)):
            # The class of their videos takes no min_pixels and max_pixels.
            self.frames = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
            self.frames.size = type(self.images.size)(**size)
        if (path / "video_preprocessor_config.json").is_file():
            stated = json.loads((path / "video_preprocessor_config.json").read_text())
            self.frames = transformers.Qwen2VLImageProcessorPil(**stated)
        if bounds is not None:
            for images in (self.images, self.frames):
                images.size = type(images.size)(shortest_edge=bounds[0], longest_edge=bounds[1])
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        # Qwen3.5 has Qwen3-VL's.
        processor = getattr(transformers, f"{'Qwen3VL' if kind.startswith('Qwen3') else kind}Processor")
        # The video half needs torchvision.
        image_only = type(
            processor.__name__,
            (processor,),
            {"get_attributes": classmethod(lambda c: ["image_processor", "tokenizer"])},
        )
        self.processor = image_only(self.images, self.tokenizer)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        text = prompt.text
        if prompt.frames:
            patches, grid = self.video(prompt.frames)
            rows = self.placeholder(len(prompt.frames), grid[0].tolist(), self.fps)
            text = self._lasting(text.replace("<|video_pad|>", rows), len(prompt.frames))
        # The processor refuses placeholders of videos that it isn't given: another special token stands in.
        text = text.replace("<|video_pad|>", "<|vision_pad|>")
        made = self.processor(text=[text], images=list(prompt.pictures) or None, return_tensors="pt")
        arguments = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        if prompt.frames:
            of_video = arguments["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|vision_pad|>")
            arguments["input_ids"].masked_fill_(of_video, self.model.config.video_token_id)
            if "mm_token_type_ids" in arguments:
                arguments["mm_token_type_ids"].masked_fill_(of_video, 2)
            arguments["pixel_values_videos"], arguments["video_grid_thw"] = patches, grid
            if self.kind == "Qwen2_5_VL":
                seconds = self.vision.temporal_patch_size / self.fps
                arguments["second_per_grid_ts"] = torch.tensor([seconds])
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)

    def placeholder(
        self, count: int, grid: Sequence[int], fps: float, metadata: VideoMetadata | None = None
    ) -> str:
        """The text in place of the placeholder of a video of ``count`` frames.

        Args:
            fps: of a video that is given as frames.
            metadata: of a video that is a file, in place of ``fps``.
        """
        merge, temporal = self.vision.spatial_merge_size, self.vision.temporal_patch_size
        if self.kind not in TIMED:
            return "<|video_pad|>" * (grid[0] * grid[1] * grid[2] // merge**2)
        # What Transformers' processor, which can't be made without torchvision, does.
        self.processor.video_processor = SimpleNamespace(merge_size=merge, temporal_patch_size=temporal)
        metadata = metadata or VideoMetadata(
            total_num_frames=count, fps=fps, frames_indices=list(range(count))
        )
        inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
        return self.processor.replace_video_token(inputs, 0)

    def _lasting(self, text: str, count: int) -> str:
        """``text`` with how long a video of ``count`` frames is, as the processors of videos that have no
        times say it."""
        if self.kind != "HyperCLOVAXVisionV2":
            return text
        seen = VideoMetadata(total_num_frames=count, frames_indices=list(range(count)))
        self.processor.video_processor = lambda videos: {"video_metadata": [seen]}
        self.processor.replace_video_token = lambda *processed, **options: ""
        self.processor._process_videos([[torch.zeros(count, 3, 4, 4)]])
        return self.processor.get_text_with_replacements([text])[0][0]

    def video(self, frames: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and grid of a video."""
        temporal, patch = self.vision.temporal_patch_size, self.vision.patch_size
        size = self.frame_size(len(frames), *frames[0].size)
        resized = [frame.resize(size, Image.Resampling(int(self.frames.resample))) for frame in frames]
        resized += resized[-1:] * (-len(resized) % temporal)
        singles = [self.frames(frame, do_resize=False, return_tensors="pt") for frame in resized]
        # Each frame alone was repeated in time: one copy of each is joined with its neighbours'.
        copies = [single["pixel_values"].view(-1, 3, temporal, patch**2)[:, :, 0] for single in singles]
        steps = range(0, len(resized), temporal)
        patches = torch.cat([torch.stack(copies[i : i + temporal], dim=2).flatten(1) for i in steps])
        return patches, torch.tensor([[len(steps), *singles[0]["image_grid_thw"][0, 1:].tolist()]])

    def frame_size(self, count: int, width: int, height: int) -> tuple[int, int]:
        """Width and height that the frames of a video are resized to, by Transformers' own arithmetic."""
        bounds, temporal = self.frames.size, self.vision.temporal_patch_size
        given = {
            "height": height,
            "width": width,
            "factor": self.vision.patch_size * self.vision.spatial_merge_size,
            "min_pixels": bounds["shortest_edge"],
            "max_pixels": bounds["longest_edge"],
        }
        module = transformers.Qwen2VLImageProcessorPil.__module__
        if self.kind in TIMED:
            module = "transformers.models.qwen3_vl.video_processing_qwen3_vl"
            given |= {"num_frames": max(count, temporal), "temporal_factor": temporal}
        height, width = import_module(module).smart_resize(**given)
        return width, height


def frames(count: int) -> list[Image.Image]:
    return [picture(40, 56, seed) for seed in range(count)]
