"""InternVL under its publishers' own names: the same model as :mod:`engine.families.internvl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import crop_encoder
from engine.families.family import Family
from engine.families.internvl.family import TOKENS, crop_placeholder, shuffled_crops
from engine.families.internvl.processor import InternVLProcessor
from engine.families.internvl.tower import parse_tower, published_rules, unused_published
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text
from engine.families.parsing.processor import parse_normalisation
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import Normalisation

#: The fields of ``vision_config`` that Transformers' class names otherwise.
_RENAMED = {"attention_bias": "qkv_bias", "use_qk_norm": "qk_normalization"}
#: Colours of ImageNet, by which the publishers' code normalises.
_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_END = "<|im_end|>"


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    return nested_text("qwen2", "qwen3", "llama", "phi3", "qwen3_moe")({"text_config": raw.get("llm_config")})


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    for field, only in (("ps_version", "v2"), ("use_thumbnail", True), ("dynamic_image_size", True)):
        if raw.get(field, only) != only:
            raise CheckpointError(
                f"config.json: {field} {raw[field]!r} is not supported; {only!r} is", param=field
            )
    stated = raw.get("vision_config") or {}
    named = {field: stated[old] for field, old in _RENAMED.items() if old in stated}
    tower = parse_tower({**stated, **named}, raw.get("select_layer", -1))
    if raw.get("force_image_size", tower.image_size) != tower.image_size:
        raise CheckpointError(
            f"config.json: force_image_size should be the tower's {tower.image_size} pixels",
            param="force_image_size",
        )
    return shuffled_crops(raw, tower, hidden, parse_normalisation(processor, _IMAGENET), "gelu")


def _with_tokens(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Adds the ids of the tokenizer's tokens for images and for the end of an answer."""
    ids, row = checkpoint.added_tokens, TOKENS["context_image_token"]
    if row not in ids:
        raise CheckpointError(f"the tokenizer has no token {row}, which this model's images need")
    ends = [ids[_END]] if _END in ids else []
    return replace(
        config,
        eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *ends])),
        image_token_id=ids[row],
        extra=dict(TOKENS),
    )


def _processor(checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]) -> InternVLProcessor:
    raw = checkpoint.config
    limits = {"min_patches": raw.get("min_dynamic_patch", 1), "max_patches": raw.get("max_dynamic_patch", 12)}
    return InternVLProcessor.of_tower(config, limits, options)


FAMILY = Family(
    name="internvl_chat",
    architectures=("InternVLChatModel",),
    reader=ConfigReader(text=_text, vision=_vision, finish=_with_tokens),
    prompt_format=lambda config: PromptFormat(
        image="<image>", video="<video>", video_prefix="Frame1: ", separator="\n"
    ),
    placeholder=crop_placeholder,
    processor=_processor,
    options=("crop_to_patches", "max_patches"),
    weights=lambda config: WeightRules(
        vision=published_rules(), ignore=unused_published(config.vision.tower)
    ),
    build_encoder=crop_encoder,
)
