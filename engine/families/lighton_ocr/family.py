"""LightOnOCR: a Pixtral tower whose squares of patches become rows, and Qwen3."""

from __future__ import annotations

from functools import partial

from engine.families.base import PromptFormat
from engine.families.encoders import native_encoder
from engine.families.family import Family
from engine.families.llava.pixtral import PixtralProcessor
from engine.families.llava.squares import square_weights, with_squares
from engine.families.llava.towers import parse_pixtral
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text, tied_unless_stated, token_field
from engine.vision.mlp_config import MLPConfig
from engine.vision.native_config import NativeVisionConfig

_TOWER = r"(?:model\.)?vision_encoder\."
_CONNECTOR = r"(?:model\.)?vision_projection\."
_MLP = MLPConfig("gelu", bias=False)


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    return with_squares(parse_pixtral(raw, processor, hidden, layer=-1, mlp=_MLP), raw)


FAMILY = Family(
    name="lighton_ocr",
    architectures=("LightOnOcrForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("qwen3", "qwen2")),
        vision=_vision,
        image_token=token_field("image_token_id", "image_token_index", default=151655),
    ),
    prompt_format=lambda config: PromptFormat(image="<|image_pad|>"),
    processor=partial(PixtralProcessor.create, own_patch=True),
    weights=lambda config: square_weights(config.vision, _TOWER, _CONNECTOR),
    build_encoder=native_encoder,
)
