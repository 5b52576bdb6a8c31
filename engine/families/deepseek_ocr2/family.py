"""DeepSeek-OCR 2: a SAM tower, an encoder with learned queries, and a DeepSeek-V2 with plain attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.checkpoint.rules import DEEPSEEK_RULES, WeightRules
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.deepseek_ocr2.config import parse_vision, published_text
from engine.families.deepseek_ocr2.processor import DeepseekProcessor
from engine.families.family import Family
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, nested_text, remember_tokens, token_field
from engine.families.parsing.sam import sam_rules

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_PUBLISHED = "DeepseekOCR2ForCausalLM"
#: The model was trained on an image and a task, without marks of who speaks.
_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- set content = message.content -%}
  {%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
  {%- for part in parts -%}
    {{- '<image>\\n' if part.type == 'image' else part.text -}}
  {%- endfor -%}
{%- endfor -%}
"""
_VISION = r"model\.vision_tower\."
#: The same part under the names of the public files, which Transformers saves too.
_SAM = r"model\.sam_model\."
_SAM_BLOCK, _BLOCK = _SAM + r"blocks\.(\d+)\.", r"tower.blocks.\1."
_TOKENS = {"image_token": "<image>"}


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    if _PUBLISHED in (raw.get("architectures") or []):
        raw = {**raw, "text_config": published_text(raw)}
    fields, kind = nested_text("deepseek_ocr2_text")(raw)
    # Transformers' class takes the share of the hidden size, whatever the file states.
    return {**fields, "head_dim": None}, kind


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    image = config.extra["image_token"]
    return PromptFormat(image=image, default_template=_TEMPLATE.replace("<image>", image))


def _encoder_rules(prefix: str) -> tuple[tuple[str, str], ...]:
    """Rename rules of the second encoder, whose names begin with ``prefix``."""
    layer, block = prefix + r"layers\.(\d+)\.", r"encoder.blocks.\1."
    return (
        (layer + r"input_layernorm\.(.*)", block + r"norm1.\2"),
        (layer + r"post_attention_layernorm\.(.*)", block + r"norm2.\2"),
        (layer + r"self_attn\.o_proj\.(.*)", block + r"attn.proj.\2"),
        (layer + r"self_attn\.(.*)", block + r"attn.\2"),
        (layer + r"mlp\.(.*)", block + r"mlp.\2"),
        (prefix + r"norm\.(.*)", r"encoder.norm.\1"),
    )


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        language=DEEPSEEK_RULES,
        vision=(
            *sam_rules(_VISION + r"sam_encoder\."),
            (_VISION + r"sam_encoder\.proj\.conv([12])\.(.*)", r"tower.reduce\1.\2"),
            (_SAM + r"pos_embed", "tower.position_embedding"),
            (_SAM + r"patch_embed\.proj\.(.*)", r"tower.patch_embed.\1"),
            (_SAM_BLOCK + r"mlp\.lin([12])\.(.*)", _BLOCK + r"mlp.fc\2.\3"),
            (_SAM_BLOCK + r"((?:norm[12]|attn)\..*)", _BLOCK + r"\2"),
            (_SAM + r"neck\.0\.(.*)", r"tower.neck_in.\1"),
            (_SAM + r"neck\.1\.(.*)", r"tower.neck_norm1.\1"),
            (_SAM + r"neck\.2\.(.*)", r"tower.neck_conv.\1"),
            (_SAM + r"neck\.3\.(.*)", r"tower.neck_norm2.\1"),
            (_SAM + r"net_2\.(.*)", r"tower.reduce1.\1"),
            (_SAM + r"net_3\.(.*)", r"tower.reduce2.\1"),
            *_encoder_rules(_VISION + r"vision_encoder\."),
            *_encoder_rules(r"model\.qwen2_model\.model\.model\."),
            (
                r"model\.(?:vision_tower\.query_768_resolution|qwen2_model\.query_768)\.weight",
                "encoder.tile_queries",
            ),
            (
                r"model\.(?:vision_tower\.query_1024_resolution|qwen2_model\.query_1024)\.weight",
                "encoder.whole_queries",
            ),
            (r"model\.(?:multi_modal_projector|projector\.layers)\.(.*)", r"projector.\1"),
            (r"model\.view_sep[ae]rator", "separator"),
        ),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.deepseek_ocr2.encoder import DeepseekVisionEncoder

    return DeepseekVisionEncoder(config.vision, build)


FAMILY = Family(
    name="deepseek_ocr2",
    architectures=("DeepseekOcr2ForConditionalGeneration", _PUBLISHED),
    reader=ConfigReader(
        text=_text,
        vision=parse_vision,
        image_token=token_field("image_token_id", default=128815),
        finish=remember_tokens(_TOKENS),
    ),
    prompt_format=_prompt_format,
    processor=DeepseekProcessor.create,
    options=("crop_to_patches", "max_patches"),
    weights=_weights,
    build_encoder=_encoder,
)
