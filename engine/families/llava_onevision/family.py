"""LLaVA-OneVision: an image as a whole and in tiles, several in one crop each, videos, and Qwen2."""

from __future__ import annotations

import re

from engine.errors import CheckpointError
from engine.families.base import PromptFormat
from engine.families.encoders import anyres_encoder
from engine.families.family import Family
from engine.families.llava_onevision.processor import PINPOINTS, LlavaOnevisionProcessor
from engine.families.parsing.anyres import anyres_weights, parse_pinpoints
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.families.parsing.processor import parse_normalisation, parse_projector
from engine.families.parsing.tower import parse_siglip
from engine.vision.anyres import AnyresConfig
from engine.vision.normalisation import CLIP_NORMALISATION


def _vision(raw: Json, processor: Json, hidden: int) -> AnyresConfig:
    vision = raw.get("vision_config") or {}
    if vision.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise CheckpointError(
            f"config.json: vision tower {vision['model_type']!r} is not supported", param="vision_config"
        )
    strategy = raw.get("vision_feature_select_strategy", "full")
    if strategy != "full":
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy {strategy!r} is not supported; full is",
            param="vision_feature_select_strategy",
        )
    aspect = raw.get("vision_aspect_ratio", "anyres_max_9")
    limit = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect))
    if limit is None:
        raise CheckpointError(
            f"config.json: vision_aspect_ratio {aspect!r} is not supported", param="vision_aspect_ratio"
        )
    tower = parse_siglip(vision, feature_layer=raw.get("vision_feature_layer", -1))
    crops = tower.crops(
        out_features=hidden,
        normalisation=parse_normalisation(processor, CLIP_NORMALISATION),
        mlp=parse_projector(raw),
    )
    pinpoints = parse_pinpoints(raw.get("image_grid_pinpoints"), crops.image_size, PINPOINTS)
    return AnyresConfig(crops, pinpoints, int(limit.group(1)))


FAMILY = Family(
    name="llava_onevision",
    architectures=("LlavaOnevisionForConditionalGeneration",),
    reader=ConfigReader(
        text=nested_text("qwen2"),
        vision=_vision,
        image_token=token_field("image_token_index", "image_token_id", default=151646),
        video_token=token_field("video_token_index", "video_token_id", default=151647),
    ),
    prompt_format=lambda config: PromptFormat(image="<image>", video="<video>"),
    processor=LlavaOnevisionProcessor.create,
    weights=anyres_weights,
    build_encoder=anyres_encoder,
)
