"""LLaVA-1.5: a CLIP crop per image, an MLP connector, and a Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.llava.processor import LlavaProcessor
from engine.families.parsing.decoder import Json, vision_activation
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_clip, tower_rules, unused_tensors
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
_CONNECTOR = r"(?:model\.)?multi_modal_projector\."


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    vision = raw.get("vision_config") or {}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise CheckpointError(
            f"config.json: vision tower {vision['model_type']!r} is not supported", param="vision_config"
        )
    layer = raw.get("vision_feature_layer", -2)
    strategy = raw.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int) or strategy not in ("default", "full"):
        raise CheckpointError(
            f"config.json: vision_feature_layer {layer!r} with strategy {strategy!r} is not supported",
            param="vision_feature_layer",
        )
    tower = parse_clip(vision, feature_layer=layer)
    return CropVisionConfig(
        tower=tower.config,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        keep_class_token=strategy == "full",
        out_features=hidden,
        normalisation=parse_normalisation(processor, CLIP_NORMALISATION),
        connector_activation=vision_activation(
            raw.get("projector_hidden_act", "gelu"), "projector_hidden_act"
        ),
        connector_bias=raw.get("multimodal_projector_bias", True),
    )


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=((_CONNECTOR + r"linear_([12])\.(.*)", r"connector.fc\1.\2"), *tower_rules(_TOWER)),
        ignore=unused_tensors(_TOWER, config.vision.tower),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.vision.crops import CropVisionEncoder

    return CropVisionEncoder(config.vision, build)


FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    reader=ConfigReader(
        text=nested_text("llama", "mistral", "qwen2", defaults={"bos_token_id": 1}),
        vision=_vision,
        image_token=token_field("image_token_index", "image_token_id", default=32000),
        end_tokens=(2,),
    ),
    prompt_format=lambda config: PromptFormat(image="<image>"),
    processor=LlavaProcessor.create,
    weights=_weights,
    build_encoder=_encoder,
)
