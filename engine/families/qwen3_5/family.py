"""Qwen3.5: most layers have a gated delta net in place of attention; images and videos as in Qwen3-VL.

The tower is Qwen3-VL's without features of several depths. The option ``fps`` states how many of a video's
frames make a second.
"""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.rules import MULTI_TOKEN_HEADS, WeightRules
from engine.families.base import ModelConfig
from engine.families.parsing.fields import Json
from engine.families.parsing.model import token_field
from engine.families.qwen2_vl.config import qwen_text
from engine.families.qwen3_vl.family import FAMILY as QWEN3_VL
from engine.families.qwen3_vl.family import remember_ends
from engine.families.retrieval import RetrievalFormat
from engine.vision.native_config import NativeVisionConfig


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    # Files may state an empty list; Transformers' class doesn't read the field.
    stated = {**(raw.get("vision_config") or {}), "deepstack_visual_indexes": ()}
    assert QWEN3_VL.reader.vision is not None
    return QWEN3_VL.reader.vision({**raw, "vision_config": stated}, processor, hidden)


def _weights(config: ModelConfig) -> WeightRules:
    rules = QWEN3_VL.weights(config)
    return replace(rules, ignore=(*rules.ignore, MULTI_TOKEN_HEADS))


FAMILY = replace(
    QWEN3_VL,
    name="qwen3_5",
    architectures=("Qwen3_5ForConditionalGeneration",),
    reader=replace(
        QWEN3_VL.reader,
        # Transformers' class for it reads the field of config.json alone.
        text=qwen_text("qwen3_5_text", text_may_tie=False),
        vision=_vision,
        image_token=token_field("image_token_id", default=248056),
        video_token=token_field("video_token_id", default=248057),
        finish=remember_ends(248053, 248054),
    ),
    retrieval=lambda config: RetrievalFormat(),
    weights=_weights,
)
