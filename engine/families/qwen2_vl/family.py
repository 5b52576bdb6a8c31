"""Qwen2-VL: images and videos at their own resolution, patches merged two by two, M-RoPE."""

from __future__ import annotations

from engine.families.base import PromptFormat
from engine.families.encoders import native_encoder
from engine.families.family import Family
from engine.families.parsing.fields import Json, integer, vision_activation
from engine.families.parsing.model import ConfigReader, token_field
from engine.families.parsing.tower import axial_theta
from engine.families.qwen2_vl.config import native_vision, qwen2_vl_rules, qwen_text
from engine.families.qwen2_vl.positions import grid_positions
from engine.families.qwen2_vl.processor import QwenProcessor, VideoRules
from engine.vision.native_config import NativeVisionConfig
from engine.vision.transformer_config import VisionConfig


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    # Public files state little more than hidden_size, which is the width of embedding rows, not of the tower.
    filled = {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": hidden,
        **(raw.get("vision_config") or {}),
    }

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return VisionConfig(
            hidden_size=width,
            intermediate_size=int(width * filled["mlp_ratio"]),
            num_layers=integer(filled, "depth"),
            num_heads=integer(filled, "num_heads"),
            patch_dim=patch_dim,
            activation=vision_activation(filled["hidden_act"]),
            rope_theta=axial_theta(filled),
        )

    return native_vision(
        filled, processor, hidden, width_field="embed_dim", out_field="hidden_size", tower=tower
    )


FAMILY = Family(
    name="qwen2_vl",
    architectures=("Qwen2VLForConditionalGeneration",),
    reader=ConfigReader(
        text=qwen_text("qwen2_vl"),
        vision=_vision,
        image_token=token_field("image_token_id", default=151655),
        video_token=token_field("video_token_id", default=151656),
    ),
    prompt_format=lambda config: PromptFormat(image="<|image_pad|>", video="<|video_pad|>"),
    positions=lambda config, ids, spans: grid_positions(len(ids), spans, config.vision.merge_size),
    processor=QwenProcessor.with_videos(VideoRules()),
    options=("min_pixels", "max_pixels", "fps"),
    weights=lambda config: qwen2_vl_rules(),
    build_encoder=native_encoder,
)
