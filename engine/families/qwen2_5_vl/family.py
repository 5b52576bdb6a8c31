"""Qwen2.5-VL: Qwen2-VL with a tower that attends within windows, and positions that follow a video's pace.

The option ``fps`` states how many of a video's frames make a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ModelConfig
from engine.families.family import Positions
from engine.families.parsing.fields import Json, integer, layer_list, vision_activation
from engine.families.parsing.tower import axial_theta
from engine.families.qwen2_vl.config import native_vision
from engine.families.qwen2_vl.family import FAMILY as QWEN2_VL
from engine.families.qwen2_vl.positions import grid_positions
from engine.families.qwen2_vl.processor import QwenProcessor, VideoRules
from engine.media.video.video import Pace
from engine.prompt import MediaSpan
from engine.vision.native_config import NativeVisionConfig
from engine.vision.transformer_config import VisionConfig


def patch_times(pace: Pace, temporal: int) -> tuple[float, ...]:
    """The second at which each temporal patch begins, by the average rate."""
    return tuple(step * (temporal / pace.rate) for step in range(-(-len(pace.times) // temporal)))


def windowed_vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    """The tower that attends within windows; arguments as of
    :attr:`~engine.families.parsing.model.ConfigReader.vision`.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
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
        **(raw.get("vision_config") or {}),
    }
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
            activation=vision_activation(filled["hidden_act"]),
            gated_mlp=True,
            norm="rms",
            rope_theta=axial_theta(filled),
            full_layers=layer_list(filled, "fullatt_block_indexes"),
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


def _with_pace(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Remembers the number of positions that a second of video takes."""
    stated = checkpoint.config.get("vision_config") or {}
    return replace(config, extra={"tokens_per_second": stated.get("tokens_per_second", 4)})


def _positions(config: ModelConfig, ids: Sequence[int], spans: Sequence[MediaSpan]) -> Positions:
    assert config.extra is not None
    pace = config.extra["tokens_per_second"]
    return grid_positions(len(ids), spans, config.vision.merge_size, tokens_per_second=pace)


FAMILY = replace(
    QWEN2_VL,
    name="qwen2_5_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    reader=replace(QWEN2_VL.reader, vision=windowed_vision, finish=_with_pace),
    positions=_positions,
    processor=QwenProcessor.with_videos(VideoRules(times=patch_times)),
    options=("min_pixels", "max_pixels", "fps"),
)
