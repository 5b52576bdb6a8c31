"""GOT-OCR 2: a SAM tower whose features convolutions make fewer, and Qwen2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.checkpoint.rules import WeightRules
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.got_ocr2.config import GotVisionConfig
from engine.families.got_ocr2.processor import GotProcessor
from engine.families.llava.towers import CONNECTOR, TOWER
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text, tied_unless_stated, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.sam import parse_sam, sam_rules
from engine.vision.normalisation import CLIP_NORMALISATION

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

#: ``<|im_end|>`` ends answers, but the public files name ``<|endoftext|>`` alone.
_END_TOKENS = (151645,)
#: A conversation as Transformers' processor writes it; the images of a message are pages of one document.
_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou should follow the instructions carefully and explain your answers ' -}}
  {{- 'in detail.<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set content = message.content -%}
  {%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
  {%- set images = parts | selectattr('type', 'equalto', 'image') | list | length -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if images -%}{{- '<img>' + '<imgpad>' * images + '</img>\\n' -}}{%- endif -%}
  {%- for part in parts if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _vision(raw: Json, processor: Json, hidden: int) -> GotVisionConfig:
    tower = parse_sam(raw.get("vision_config") or {}, out=hidden)
    return GotVisionConfig(tower, hidden, parse_normalisation(processor, CLIP_NORMALISATION))


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (CONNECTOR + r"conv_upsampler([12])\.(.*)", r"tower.reduce\1.\2"),
            (CONNECTOR + r"multimodal_projector\.(.*)", r"connector.\1"),
            *sam_rules(TOWER),
        )
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.got_ocr2.encoder import GotVisionEncoder

    return GotVisionEncoder(config.vision, build)


FAMILY = Family(
    name="got_ocr2",
    architectures=("GotOcr2ForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("qwen2")),
        vision=_vision,
        image_token=token_field("image_token_index", "image_token_id", default=151859),
        end_tokens=_END_TOKENS,
    ),
    prompt_format=lambda config: PromptFormat(image="<imgpad>", default_template=_TEMPLATE),
    processor=GotProcessor.create,
    options=("crop_to_patches", "max_patches"),
    weights=_weights,
    build_encoder=_encoder,
)
