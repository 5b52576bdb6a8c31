"""Qwen3-VL: the decoder's first layers get features of several depths, and each step of a video its time.

The option ``fps`` states how many of a video's frames make a second.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig
from engine.families.parsing.fields import Json, integer, layer_list, vision_activation
from engine.families.parsing.model import token_field
from engine.families.parsing.tower import axial_theta
from engine.families.qwen2_vl.config import (
    VISUAL,
    native_vision,
    qwen_text,
    qwen_vl_rules,
)
from engine.families.qwen2_vl.family import FAMILY as QWEN2_VL
from engine.families.qwen2_vl.processor import QwenProcessor, VideoRules, enlarged, smart_resize
from engine.families.retrieval import QWEN3_VL_PAIRS, RetrievalFormat
from engine.media.video.sampling import qwen3_indices
from engine.media.video.video import Pace
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.native_config import NativeVisionConfig
from engine.vision.normalisation import HALF_NORMALISATION
from engine.vision.transformer_config import VisionConfig


def video_size(
    frames: int, size: tuple[int, int], temporal: int, factor: int, low: int, high: int
) -> tuple[int, int]:
    """Size of a resized video's frames. Their areas are bounded together; frames smaller than a merged square
    are enlarged first."""
    return smart_resize(
        enlarged(size, factor), factor, low, high, frames=max(frames, temporal), temporal=temporal
    )


def patch_times(pace: Pace, temporal: int) -> tuple[float, ...]:
    """The second in the middle of each temporal patch, the mean of its first and last frame's."""
    times = pace.times
    last = len(times) - 1
    return tuple(
        (times[first] + times[min(first + temporal - 1, last)]) / 2
        for first in range(0, len(times), temporal)
    )


def capped_area(frames: int, row: int, bounds: tuple[int, int], tokens: int, temporal: int) -> int:
    """Greatest area of all frames such that each has at most ``tokens`` rows and its share of the bound."""
    low, high = bounds
    frames = max(frames, temporal)
    return max(min(tokens * row, high // frames), int(low * 1.05)) * frames


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
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
        **(raw.get("vision_config") or {}),
    }
    layers, table = integer(filled, "depth"), integer(filled, "num_position_embeddings")
    side = round(table**0.5)
    if side * side != table:
        raise CheckpointError(
            f"config.json: num_position_embeddings {table} should be a square number",
            param="num_position_embeddings",
        )
    deepstack = layer_list(filled, "deepstack_visual_indexes")
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
            rope_theta=axial_theta(filled),
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


def remember_ends(start: int, end: int) -> Callable[[ModelConfig, Checkpoint], ModelConfig]:
    """For :attr:`~engine.families.parsing.model.ConfigReader.finish`: remember the tokens around media.

    Args:
        start, end: the tokens where config.json states none.
    """

    def finish(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
        raw, decoder = checkpoint.config, config.decoder
        return replace(
            config,
            extra={
                "vision_start": token_field("vision_start_token_id", default=start)(raw, decoder),
                "vision_end": token_field("vision_end_token_id", default=end)(raw, decoder),
            },
        )

    return finish


def _with_deepstack(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Tells the decoder of the features of several depths, and remembers the tokens that enclose media."""
    layers = tuple(range(len(config.vision.deepstack_layers)))
    found = remember_ends(151652, 151653)(config, checkpoint)
    return replace(found, decoder=replace(config.decoder, deepstack_layers=layers))


def timed_placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """A video's steps one by one, each after its time and between the tokens that enclose media."""
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


def _weights(config: ModelConfig) -> WeightRules:
    return qwen_vl_rules(
        (VISUAL + r"pos_embed\.weight", "position_embedding"),
        (VISUAL + r"merger\.norm\.(.*)", r"merger.norm.\1"),
        (VISUAL + r"merger\.linear_(fc[12]\..*)", r"merger.mlp.\1"),
        (VISUAL + r"deepstack_merger_list\.(\d+)\.norm\.(.*)", r"deepstack.\1.norm.\2"),
        (VISUAL + r"deepstack_merger_list\.(\d+)\.linear_(fc[12]\..*)", r"deepstack.\1.mlp.\2"),
        (VISUAL + r"(blocks\.\d+\.mlp\.)linear_(fc[12]\..*)", r"tower.\1\2"),
    )


def _instruction(text: str) -> str:
    """An instruction as Qwen3-VL-Embedding's published script writes it: it ends in punctuation."""
    text = text.strip()
    return f"{text}." if text and not unicodedata.category(text[-1]).startswith("P") else text


_RETRIEVAL = RetrievalFormat(
    pairs=QWEN3_VL_PAIRS,
    default_instruction="Represent the user's input.",
    write_instruction=_instruction,
)

VIDEOS = VideoRules(
    size=video_size,
    times=patch_times,
    sample=qwen3_indices,
    cap=capped_area,
    max_video_tokens=768,
    bounds=(128 * 32 * 32, 768 * 32 * 32),
    named_bounds=False,
    normalisation=HALF_NORMALISATION,
)

FAMILY = replace(
    QWEN2_VL,
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    reader=replace(
        QWEN2_VL.reader,
        # Transformers' class for it reads the field of config.json alone.
        text=qwen_text("qwen3_vl", text_may_tie=False),
        vision=_vision,
        finish=_with_deepstack,
    ),
    placeholder=timed_placeholder,
    processor=QwenProcessor.with_videos(VIDEOS),
    options=("min_pixels", "max_pixels", "fps"),
    retrieval=lambda config: _RETRIEVAL,
    weights=_weights,
)
