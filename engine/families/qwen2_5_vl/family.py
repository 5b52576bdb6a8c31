"""Qwen2.5-VL: Qwen2-VL with a tower that attends within windows, and videos that tell their pace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.parsing.decoder import integer
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


def patch_times(frames: int, temporal: int, fps: float) -> tuple[float, ...]:
    """The second at which each temporal patch begins."""
    return tuple(step * (temporal / fps) for step in range(-(-frames // temporal)))


class Qwen25VLFamily:
    """Qwen2.5-VL, 3B tied to 72B untied.

    The option ``fps`` says how many of a video's frames make a second.
    """

    name = "qwen2_5_vl"
    architectures = ("Qwen2_5_VLForConditionalGeneration",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        config = parse_qwen_vl(
            checkpoint,
            family=self.name,
            architecture=self.architectures[0],
            kind="qwen2_vl",
            vision=_vision,
        )
        stated = checkpoint.config.get("vision_config") or {}
        return replace(config, extra={"tokens_per_second": stated.get("tokens_per_second", 4)})

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image=IMAGE_MARK, video=VIDEO_MARK)

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        return item.placeholder

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        assert config.extra is not None
        pace = config.extra["tokens_per_second"]
        return grid_positions(num_tokens, spans, config.vision.merge_size, tokens_per_second=pace)

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        return QwenProcessor.create(checkpoint, config, options, VideoRules(times=patch_times))

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        return qwen_vl_rules(config, *SEQUENTIAL_MERGER)

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.vision.native import NativeVisionEncoder

        return NativeVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> NativeVisionConfig:
    filled = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "hidden_act": "silu",
        "out_hidden_size": hidden,
        **raw,
    }
    if filled["hidden_act"] != "silu":
        raise CheckpointError(
            f"config.json: hidden_act {filled['hidden_act']!r} of the tower is not supported; silu is",
            param="hidden_act",
        )
    cell = integer(filled, "patch_size") * integer(filled, "spatial_merge_size")
    window = integer(filled, "window_size") // cell
    if not window:
        raise CheckpointError("config.json: window_size is smaller than one row", param="window_size")

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return VisionConfig(
            hidden_size=width,
            intermediate_size=integer(filled, "intermediate_size"),
            num_layers=integer(filled, "depth"),
            num_heads=integer(filled, "num_heads"),
            patch_dim=patch_dim,
            activation="silu",
            gated_mlp=True,
            norm="rms",
            rope_theta=10000.0,
            full_layers=tuple(filled["fullatt_block_indexes"]),
        )

    return native_vision(
        filled,
        processor,
        hidden,
        width_field="hidden_size",
        out_field="out_hidden_size",
        tower=tower,
        window=window,
    )


FAMILY = Qwen25VLFamily()
