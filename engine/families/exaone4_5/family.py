"""EXAONE 4.5: Qwen2.5-VL's tower with fewer KV heads, and EXAONE 4 with positions of text alone."""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.rules import SANDWICH_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.family import plain_positions
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import nested_text, remember_tokens, token_field
from engine.families.qwen2_5_vl.family import windowed_vision
from engine.families.qwen2_vl.family import FAMILY as QWEN2_VL
from engine.vision.native_config import NativeVisionConfig

#: The tokenizer's fields of the tokens of images and videos, and the usual values.
_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
#: Layers that predict further tokens, which Transformers leaves out too.
_FURTHER_HEADS = r"(?:.*\.)?mtp\..*"


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    """The decoder's fields, whose kind the first files call by another name."""
    stated = raw.get("text_config") or {}
    if stated.get("model_type") == "exaone4_5_text":
        raw = {**raw, "text_config": {**stated, "model_type": "exaone4"}}
    return nested_text("exaone4", text_may_tie=False)(raw)


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    stated = {"hidden_size": 3584, "num_key_value_heads": 8, **(raw.get("vision_config") or {})}
    vision = windowed_vision({**raw, "vision_config": stated}, processor, hidden)
    heads, kv_heads = vision.tower.num_heads, integer(stated, "num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: vision_config.num_key_value_heads {kv_heads} should divide num_heads {heads}",
            param="vision_config",
        )
    return replace(vision, tower=replace(vision.tower, num_kv_heads=kv_heads))


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["image_token"], video=config.extra["video_token"])


def _weights(config: ModelConfig) -> WeightRules:
    rules = QWEN2_VL.weights(config)
    return replace(rules, language=SANDWICH_RULES, ignore=(*rules.ignore, _FURTHER_HEADS))


FAMILY = replace(
    QWEN2_VL,
    name="exaone4_5",
    architectures=("Exaone4_5_ForConditionalGeneration",),
    reader=replace(
        QWEN2_VL.reader,
        text=_text,
        vision=_vision,
        image_token=token_field("image_token_id", default=67),
        video_token=token_field("video_token_id", default=68),
        finish=remember_tokens(_TOKENS),
    ),
    prompt_format=_prompt_format,
    positions=plain_positions,
    weights=_weights,
)
