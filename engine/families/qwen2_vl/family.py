"""Qwen2-VL: pictures and videos in their own resolution, rows merged two by two, M-RoPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.rules import WeightRules
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.parsing.decoder import integer, vision_activation
from engine.families.qwen2_vl.config import (
    IMAGE_MARK,
    SEQUENTIAL_MERGER,
    VIDEO_MARK,
    native_vision,
    parse_qwen_vl,
    qwen_vl_rules,
)
from engine.families.qwen2_vl.positions import grid_positions
from engine.families.qwen2_vl.processor import QwenProcessor, VideoRules
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun
from engine.vision.native_config import NativeVisionConfig
from engine.vision.transformer_config import VisionConfig

if TYPE_CHECKING:
    from engine.checkpoint.folder import Checkpoint
    from engine.layers.build import BuildContext


class Qwen2VLFamily:
    """Qwen2-VL, 2B tied to 72B untied."""

    name = "qwen2_vl"
    architectures = ("Qwen2VLForConditionalGeneration",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        return parse_qwen_vl(
            checkpoint,
            family=self.name,
            architecture=self.architectures[0],
            kind="qwen2_vl",
            vision=_vision,
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image=IMAGE_MARK, video=VIDEO_MARK)

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        return item.placeholder

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        return grid_positions(num_tokens, spans, config.vision.merge_size)

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        return QwenProcessor.create(checkpoint, config, options, VideoRules())

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        return qwen_vl_rules(config, *SEQUENTIAL_MERGER)

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.vision.native import NativeVisionEncoder

        return NativeVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> NativeVisionConfig:
    # The public files state little more than hidden_size, which is the width of the rows, not of the tower.
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
        **raw,
    }

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return VisionConfig(
            hidden_size=width,
            intermediate_size=int(width * filled["mlp_ratio"]),
            num_layers=integer(filled, "depth"),
            num_heads=integer(filled, "num_heads"),
            patch_dim=patch_dim,
            activation=vision_activation(filled["hidden_act"]),
            rope_theta=10000.0,
        )

    return native_vision(
        filled, processor, hidden, width_field="embed_dim", out_field="hidden_size", tower=tower
    )


FAMILY = Qwen2VLFamily()
