"""PaliGemma and PaliGemma 2: SigLIP before a Gemma or a Gemma 2, and prompts that attend both ways.

The models were trained on images, ``<bos>``, a text and a line feed, which prompts spell out; the chat
template writes them for checkpoints that have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import DECODER_RULES, SANDWICH_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import crop_encoder
from engine.families.family import Family
from engine.families.llava.processor import LlavaProcessor
from engine.families.llava.towers import CONNECTOR, TOWER
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text, tied_unless_stated, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_siglip, tower_rules, unused_tensors
from engine.layers.decoder_config import DecoderConfig
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import HALF_NORMALISATION

_TEMPLATE = """\
{%- if messages | length != 1 or messages[0].role != 'user' -%}
  {{- raise_exception('this model answers one message of a user') -}}
{%- endif -%}
{%- set content = messages[0].content -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- for part in parts if part.type == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{{- bos_token -}}
{%- for part in parts if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- '\\n' -}}
"""


def paligemma_text(raw: Json, *kinds: DecoderKind) -> tuple[Json, DecoderKind]:
    """The decoder's fields in ``raw``, a PaliGemma's configuration, whose decoder is one of ``kinds``."""
    text, kind = tied_unless_stated(nested_text(*kinds))(raw)
    # All prompts attend both ways, whether or not the file says so.
    return {**text, "use_bidirectional_attention": None}, kind


def paligemma_vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    """The tower and the connector in ``raw``, a PaliGemma's configuration."""
    return parse_siglip(raw.get("vision_config") or {}).crops(
        out_features=hidden,
        normalisation=parse_normalisation(processor, HALF_NORMALISATION),
        mlp=None,
    )


def paligemma_image_token(raw: Json, decoder: DecoderConfig) -> int | None:
    """The id of an image's tokens in ``raw``, a PaliGemma's configuration."""
    return token_field("image_token_index", "image_token_id", default=256000)(raw, decoder)


def paligemma_decoder(decoder: DecoderConfig) -> DecoderConfig:
    """``decoder`` with the attention and the positions of PaliGemma's prompts."""
    return replace(decoder, rope=replace(decoder.rope, first_position=1), both_ways="prompt")


def paligemma_processor(
    checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
) -> LlavaProcessor:
    """An image is resized to the tower's square.

    Raises:
        CheckpointError: the file states another size, or another number of rows than the model has.
    """
    rows = config.vision.rows_per_crop
    stated = checkpoint.preprocessor_config.get("image_seq_length", rows)
    if stated != rows:
        raise CheckpointError(
            f"preprocessor_config.json: image_seq_length {stated} differs from the model's {rows} rows per "
            "image",
            param="image_seq_length",
        )
    return LlavaProcessor.create(checkpoint, config, options)


def _finished(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    return replace(config, decoder=paligemma_decoder(config.decoder))


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        language=SANDWICH_RULES if config.decoder.sandwich else DECODER_RULES,
        vision=((CONNECTOR + r"linear\.(.*)", r"connector.\1"), *tower_rules(TOWER)),
        ignore=unused_tensors(TOWER, config.vision.tower),
    )


FAMILY = Family(
    name="paligemma",
    architectures=("PaliGemmaForConditionalGeneration",),
    reader=ConfigReader(
        text=lambda raw: paligemma_text(raw, "gemma", "gemma2"),
        vision=paligemma_vision,
        image_token=paligemma_image_token,
        finish=_finished,
    ),
    prompt_format=lambda config: PromptFormat(
        image="<image>", adds_special=False, default_template=_TEMPLATE
    ),
    processor=paligemma_processor,
    weights=_weights,
    build_encoder=crop_encoder,
)
