"""Qwen3-VL: features of several depths reach the decoder's first layers, and videos are told by the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.parsing.decoder import integer, vision_activation
from engine.families.qwen2_vl.config import (
    IMAGE_MARK,
    VIDEO_MARK,
    VISUAL,
    native_vision,
    parse_qwen_vl,
    qwen_vl_rules,
)
from engine.families.qwen2_vl.positions import grid_positions
from engine.families.qwen2_vl.processor import QwenProcessor, VideoRules, smart_resize
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun
from engine.vision.native_config import NativeVisionConfig
from engine.vision.transformer_config import VisionConfig

if TYPE_CHECKING:
    from engine.checkpoint.folder import Checkpoint
    from engine.layers.build import BuildContext


def video_size(
    frames: int, size: tuple[int, int], temporal: int, factor: int, low: int, high: int
) -> tuple[int, int]:
    """Size of a video's frames, whose areas are bounded together; small ones are first made a row high."""
    width, height = size
    if min(size) < factor:
        scale = max(factor / height, factor / width)
        width, height = int(width * scale), int(height * scale)
    return smart_resize((width, height), factor, low, high, frames=max(frames, temporal), temporal=temporal)


def patch_times(frames: int, temporal: int, fps: float) -> tuple[float, ...]:
    """The second in the middle of each temporal patch, its first and last frame's mean."""
    last = frames - 1
    return tuple(
        (first / fps + min(first + temporal - 1, last) / fps) / 2 for first in range(0, frames, temporal)
    )


class Qwen3VLFamily:
    """Qwen3-VL, the dense ones: 2B tied to 32B untied.

    The option ``fps`` says how many of a video's frames make a second.
    """

    name = "qwen3_vl"
    architectures = ("Qwen3VLForConditionalGeneration",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        config = parse_qwen_vl(
            checkpoint,
            family=self.name,
            architecture=self.architectures[0],
            kind="qwen3",
            vision=_vision,
            text_defaults={"rope_theta": 5e5, "max_position_embeddings": 128000},
        )
        raw, decoder = checkpoint.config, config.decoder
        return replace(
            config,
            decoder=replace(
                decoder,
                num_deepstack=len(config.vision.deepstack_layers),
                rope=replace(decoder.rope, mrope_interleaved=True),
            ),
            extra={
                "vision_start": raw.get("vision_start_token_id", 151652),
                "vision_end": raw.get("vision_end_token_id", 151653),
            },
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image=IMAGE_MARK, video=VIDEO_MARK)

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        """A video is its steps one by one, each after its time and between the tokens that enclose media."""
        if item.kind == "image":
            return item.placeholder
        assert config.extra is not None and config.video_token_id is not None
        runs = []
        for seconds in item.times:
            before = [*encode(f"<{seconds:.1f} seconds>"), config.extra["vision_start"]]
            runs += [PlaceholderRun(token, 1, False) for token in before]
            runs.append(PlaceholderRun(config.video_token_id, item.num_tokens // len(item.times), True))
            runs.append(PlaceholderRun(config.extra["vision_end"], 1, False))
        return tuple(runs)

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        return grid_positions(num_tokens, spans, config.vision.merge_size)

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        video = VideoRules(size=video_size, times=patch_times)
        return QwenProcessor.create(checkpoint, config, options, video)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        return qwen_vl_rules(
            config,
            (VISUAL + r"pos_embed\.weight", "position_embedding"),
            (VISUAL + r"merger\.norm\.(.*)", r"merger.norm.\1"),
            (VISUAL + r"merger\.linear_(fc[12]\..*)", r"merger.mlp.\1"),
            (VISUAL + r"deepstack_merger_list\.(\d+)\.norm\.(.*)", r"deepstack.\1.norm.\2"),
            (VISUAL + r"deepstack_merger_list\.(\d+)\.linear_(fc[12]\..*)", r"deepstack.\1.mlp.\2"),
            (VISUAL + r"(blocks\.\d+\.mlp\.)linear_(fc[12]\..*)", r"tower.\1\2"),
        )

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.vision.native import NativeVisionEncoder

        return NativeVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> NativeVisionConfig:
    filled = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
        "out_hidden_size": hidden,
        **raw,
    }
    layers, table = integer(filled, "depth"), integer(filled, "num_position_embeddings")
    side = round(table**0.5)
    if side * side != table:
        raise CheckpointError(
            f"config.json: num_position_embeddings {table} is no square number",
            param="num_position_embeddings",
        )
    deepstack = tuple(filled["deepstack_visual_indexes"])
    if not all(0 <= layer < layers for layer in deepstack):
        raise CheckpointError(
            f"config.json: deepstack_visual_indexes {list(deepstack)} are not all in a tower of {layers} "
            "layers",
            param="deepstack_visual_indexes",
        )

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return VisionConfig(
            hidden_size=width,
            intermediate_size=integer(filled, "intermediate_size"),
            num_layers=layers,
            num_heads=integer(filled, "num_heads"),
            patch_dim=patch_dim,
            patch_bias=True,
            activation=vision_activation(filled["hidden_act"]),
            rope_theta=10000.0,
        )

    return native_vision(
        filled,
        processor,
        hidden,
        width_field="hidden_size",
        out_field="out_hidden_size",
        tower=tower,
        position_side=side,
        deepstack_layers=deepstack,
    )


FAMILY = Qwen3VLFamily()
