"""VideoLLaMA 3's images: a SigLIP with rotary positions, each of whose patches is a row, before a Qwen2.

Its videos, whose rows depend on what changes from frame to frame, are not taken.
"""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.rules import WeightRules
from engine.families.base import ImagesOnly, ModelConfig, PromptFormat
from engine.families.encoders import native_encoder
from engine.families.family import Family
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import axial_theta, parse_siglip, tower_rules, unused_tensors
from engine.families.qwen2_vl.config import native_vision
from engine.families.qwen2_vl.processor import QwenProcessor, VideoRules
from engine.vision.mlp_config import MLPConfig
from engine.vision.native_config import NativeVisionConfig
from engine.vision.normalisation import HALF_NORMALISATION
from engine.vision.transformer_config import VisionConfig

_TOWER = r"(?:model\.)?vision_model\."
_PROJECTOR = r"(?:model\.)?projector\.readout\."


class ImageProcessor(ImagesOnly, QwenProcessor):
    """See :class:`engine.families.qwen2_vl.processor.QwenProcessor`."""

    __slots__ = ()


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    stated = raw.get("vision_config") or {}
    # There is no table of positions, whose side this would be.
    square = parse_siglip({**stated, "image_size": stated.get("patch_size", 16)})

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return replace(square.config, num_positions=0, rope_theta=axial_theta(stated))

    filled = {
        **stated,
        "hidden_size": square.config.hidden_size,
        "patch_size": square.patch_size,
        "out": hidden,
        "spatial_merge_size": 1,
        "temporal_patch_size": 1,
    }
    found = native_vision(
        filled, processor, hidden, width_field="hidden_size", out_field="out", tower=tower, mlp=MLPConfig()
    )
    return replace(found, normalisation=parse_normalisation(processor, HALF_NORMALISATION))


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            *tower_rules(_TOWER),
            (_PROJECTOR + r"0\.(.*)", r"merger.fc1.\1"),
            (_PROJECTOR + r"2\.(.*)", r"merger.fc2.\1"),
        ),
        ignore=unused_tensors(_TOWER, config.vision.tower),
    )


FAMILY = Family(
    name="video_llama_3",
    architectures=("VideoLlama3ForConditionalGeneration",),
    reader=ConfigReader(
        text=nested_text("qwen2"),
        vision=_vision,
        image_token=token_field("image_token_id", default=151655),
    ),
    prompt_format=lambda config: PromptFormat(image="<|image_pad|>"),
    processor=ImageProcessor.with_videos(VideoRules(normalisation=HALF_NORMALISATION)),
    options=("min_pixels", "max_pixels"),
    weights=_weights,
    build_encoder=native_encoder,
)
