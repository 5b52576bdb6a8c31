"""DeepSeek-VL with one tower: SigLIP, an MLP, and a Llama."""

from __future__ import annotations

from engine.checkpoint.rules import WeightRules
from engine.families.base import ModelConfig, PromptFormat
from engine.families.deepseek_vl.processor import DeepseekVLProcessor
from engine.families.encoders import crop_encoder
from engine.families.family import Family
from engine.families.parsing.fields import Json
from engine.families.parsing.model import (
    ConfigReader,
    nested_text,
    remember_tokens,
    tied_unless_stated,
    token_field,
)
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_siglip, tower_rules, unused_tensors
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION

_TOWER = r"(?:model\.)?vision_model\.(?:vision_model\.)?"
#: The tokenizer's field of the token of images, and the usual value.
_TOKENS = {"image_token": "<image_placeholder>"}


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    normalisation = parse_normalisation(processor, CLIP_NORMALISATION)
    return parse_siglip(raw.get("vision_config") or {}).crops(
        out_features=hidden, normalisation=normalisation
    )


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["image_token"])


def _weights(config: ModelConfig) -> WeightRules:
    aligner = (r"(?:model\.)?aligner\.linear([12])\.(.*)", r"connector.fc\1.\2")
    return WeightRules(
        vision=(aligner, *tower_rules(_TOWER)), ignore=unused_tensors(_TOWER, config.vision.tower)
    )


FAMILY = Family(
    name="deepseek_vl",
    architectures=("DeepseekVLForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("llama", text_may_tie=False)),
        vision=_vision,
        image_token=token_field("image_token_id", default=100015),
        finish=remember_tokens(_TOKENS),
    ),
    prompt_format=_prompt_format,
    processor=DeepseekVLProcessor.create,
    weights=_weights,
    build_encoder=crop_encoder,
)
