"""LLaVA-NeXT (LLaVA 1.6): images as a whole and in tiles, CLIP or SigLIP, decoders of several kinds."""

from __future__ import annotations

from engine.errors import CheckpointError
from engine.families.base import PromptFormat
from engine.families.encoders import anyres_encoder
from engine.families.family import Family
from engine.families.llava.towers import parse_vision
from engine.families.llava_next.processor import PINPOINTS, LlavaNextProcessor
from engine.families.parsing.anyres import anyres_weights, parse_pinpoints
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.vision.anyres import AnyresConfig
from engine.vision.crops_config import CropVisionConfig


def parse_anyres(raw: Json, processor: Json, hidden: int) -> AnyresConfig:
    """The tower and the tilings of config.json (``raw``), for rows of ``hidden`` numbers.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    crops = parse_vision(raw, processor, hidden)
    if not isinstance(crops, CropVisionConfig):
        raise CheckpointError(
            "config.json: the tower should be clip_vision_model or siglip_vision_model",
            param="vision_config",
        )
    if crops.drop_first != crops.tower.class_token:
        # Tiles are joined by their patches: another token among them has no place.
        suits = "default" if crops.tower.class_token else "full"
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy should be {suits} with this tower",
            param="vision_feature_select_strategy",
        )
    pinpoints = parse_pinpoints(raw.get("image_grid_pinpoints"), crops.image_size, PINPOINTS)
    return AnyresConfig(crops, pinpoints)


FAMILY = Family(
    name="llava_next",
    architectures=("LlavaNextForConditionalGeneration",),
    reader=ConfigReader(
        text=nested_text("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "granite"),
        vision=parse_anyres,
        image_token=token_field("image_token_index", "image_token_id", default=32000),
        end_tokens=(2,),
    ),
    prompt_format=lambda config: PromptFormat(image="<image>"),
    processor=LlavaNextProcessor.create,
    weights=anyres_weights,
    build_encoder=anyres_encoder,
)
