"""HyperCLOVA X with images and videos: Qwen2.5-VL's tower, a projection, and positions of text alone.

Its chat template tells the model how long a video is.
"""

from __future__ import annotations

import json
from dataclasses import replace

from engine.checkpoint.rules import HYPERCLOVAX_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.family import plain_positions
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import nested_text, remember_tokens, tied_unless_stated, token_field
from engine.families.qwen2_5_vl.family import windowed_vision
from engine.families.qwen2_vl.config import qwen2_vl_rules
from engine.families.qwen2_vl.family import FAMILY as QWEN2_VL
from engine.families.qwen2_vl.processor import QwenProcessor, VideoRules
from engine.media.video.video import Pace
from engine.prompt import MediaItem
from engine.vision.native_config import NativeVisionConfig

#: The tokenizer's fields of the tokens of images and videos, and the usual values.
_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
#: Parts of the publisher's models that hear or draw as well.
_FURTHER_PARTS = ("audio_config", "discrete_audio_config", "discrete_vision_config")
_DURATION = "<|video_duration|>"
_TOWER = r"(?:model\.)?vision_model\."


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    for field in _FURTHER_PARTS:
        if raw.get(field):
            raise CheckpointError(f"config.json: {field} is not supported", param=field)
    stated = {"out_hidden_size": 3584, **(raw.get("vision_config") or {})}
    width = integer(stated, "out_hidden_size")
    vision = windowed_vision({**raw, "vision_config": stated}, processor, width)
    return replace(vision, out_features=hidden, merged_features=width)


def _duration(pace: Pace, temporal: int) -> tuple[float, ...]:
    """The seconds of a whole video, as Transformers counts and rounds them."""
    seconds = len(pace.times) / pace.rate if pace.duration is None else pace.duration
    return (round(seconds, 2),)


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    image, video = (config.extra[field] for field in _TOKENS)
    return PromptFormat(image=image, video=video, video_mark=_DURATION)


def _written_duration(config: ModelConfig, item: MediaItem) -> str:
    return json.dumps(item.times[0])


def _weights(config: ModelConfig) -> WeightRules:
    projector = (r"(?:model\.)?(?:vision_|mm_)?projector\.(.*)", r"projector.\1")
    return replace(qwen2_vl_rules(projector, prefix=_TOWER), language=HYPERCLOVAX_RULES)


FAMILY = replace(
    QWEN2_VL,
    name="hyperclovax_vision_v2",
    architectures=("HCXVisionV2ForCausalLM", "HyperCLOVAXVisionV2ForConditionalGeneration"),
    reader=replace(
        QWEN2_VL.reader,
        text=tied_unless_stated(nested_text("hyperclovax", text_may_tie=False)),
        vision=_vision,
        image_token=token_field("image_token_id", default=128060),
        video_token=token_field("video_token_id", default=128061),
        finish=remember_tokens(_TOKENS),
    ),
    prompt_format=_prompt_format,
    video_mark_text=_written_duration,
    positions=plain_positions,
    processor=QwenProcessor.with_videos(VideoRules(times=_duration)),
    weights=_weights,
)
