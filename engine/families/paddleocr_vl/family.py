"""PaddleOCR-VL: a SigLIP for images of any size, with learned and rotary positions, and M-RoPE behind it."""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.rules import WeightRules
from engine.families.base import ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json
from engine.families.parsing.model import ConfigReader, token_field
from engine.families.parsing.tower import axial_theta, parse_siglip, tower_rules, unused_tensors
from engine.families.qwen2_vl.config import native_vision, qwen_text
from engine.families.qwen2_vl.family import FAMILY as QWEN2_VL
from engine.families.qwen2_vl.processor import ImageRules, QwenProcessor, VideoRules
from engine.vision.native_config import NativeVisionConfig
from engine.vision.transformer_config import VisionConfig

_TOWER = r"(?:model\.)?visual\.vision_model\."
_PROJECTOR = r"(?:mlp_AR|model\.projector)\."
_TOWER_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    """The decoder's fields. Embeddings are tied unless config.json and its ``text_config`` both deny it,
    as in Transformers. A stored head with other values than the embeddings is used all the same."""
    fields, kind = qwen_text("paddleocr_vl")(raw)
    stated = (raw, raw.get("text_config") or {})
    tied = any(part.get("tie_word_embeddings", True) for part in stated)
    return {**fields, "tie_word_embeddings": tied}, kind


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    stated = raw.get("vision_config") or {}
    square = parse_siglip(stated, defaults=_TOWER_DEFAULTS)

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return replace(square.config, num_positions=0, rope_theta=axial_theta(stated))

    filled = {
        "spatial_merge_size": 2,
        **stated,
        "hidden_size": square.config.hidden_size,
        "patch_size": square.patch_size,
        "out": hidden,
        # config.json states 2, but each patch is of one image.
        "temporal_patch_size": 1,
    }
    return native_vision(
        filled,
        processor,
        hidden,
        width_field="hidden_size",
        out_field="out",
        tower=tower,
        position_side=square.image_size // square.patch_size,
        position_corners=False,
        merger_norm_eps=1e-5,
    )


def enlarged(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """``(width, height)`` of an image enlarged so that both sides are at least ``factor``: the published
    processor's first step."""
    width, height = size
    if height < factor:
        width, height = round(width * factor / height), factor
    if width < factor:
        width, height = factor, round(height * factor / width)
    return width, height


def _weights(config: ModelConfig) -> WeightRules:
    tower: VisionConfig = config.vision.tower
    return WeightRules(
        vision=(
            (_TOWER + r"embeddings\.position_embedding\.weight", "position_embedding"),
            *tower_rules(_TOWER),
            (_PROJECTOR + r"pre_norm\.(.*)", r"merger.norm.\1"),
            (_PROJECTOR + r"linear_([12])\.(.*)", r"merger.mlp.fc\1.\2"),
        ),
        ignore=(_TOWER + r"embeddings\.packing_position_embedding\..*", *unused_tensors(_TOWER, tower)),
    )


FAMILY: Family = replace(
    QWEN2_VL,
    name="paddleocr_vl",
    architectures=("PaddleOCRVLForConditionalGeneration",),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        image_token=token_field("image_token_id", default=100295),
        video_token=token_field("video_token_id", default=100296),
    ),
    prompt_format=lambda config: PromptFormat(image="<|IMAGE_PLACEHOLDER|>"),
    processor=QwenProcessor.with_videos(VideoRules(), ImageRules(enlarged, bounds=(384 * 384, 1536 * 1536))),
    options=("min_pixels", "max_pixels"),
    weights=_weights,
)
