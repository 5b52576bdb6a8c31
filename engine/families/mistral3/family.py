"""Mistral Small 3.1 and later, and Ministral-3: a Pixtral tower whose squares of patches become rows."""

from __future__ import annotations

from engine.families.encoders import native_encoder
from engine.families.family import Family
from engine.families.llava.lines import line_placeholder, line_prompt, with_tokens
from engine.families.llava.pixtral import PixtralProcessor
from engine.families.llava.squares import square_weights, with_squares
from engine.families.llava.towers import CONNECTOR, TOWER, parse_pixtral
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text, tied_unless_stated, token_field
from engine.families.parsing.processor import parse_projector
from engine.vision.native_config import NativeVisionConfig


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    mlp = parse_projector({"multimodal_projector_bias": False, **raw})
    layer = raw.get("vision_feature_layer", -1)
    vision = parse_pixtral(raw, processor, hidden, layer=layer, mlp=mlp)
    return with_squares(vision, raw)


FAMILY = Family(
    name="mistral3",
    architectures=("Mistral3ForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("mistral", "ministral3")),
        vision=_vision,
        image_token=token_field("image_token_index", "image_token_id", default=10),
        end_tokens=(2,),
        finish=with_tokens,
    ),
    prompt_format=line_prompt,
    placeholder=line_placeholder,
    processor=PixtralProcessor.create,
    weights=lambda config: square_weights(config.vision, TOWER, CONNECTOR),
    build_encoder=native_encoder,
)
