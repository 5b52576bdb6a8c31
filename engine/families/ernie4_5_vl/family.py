"""ERNIE 4.5 VL: a tower like Qwen2-VL's, rows of one or two frames, times that are drawn onto the frames of
videos, and experts of their own for tokens of images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import MULTI_TOKEN_LAYERS, WeightRules, ernie_vl_rules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import native_encoder
from engine.families.ernie4_5_vl.public import PLACEHOLDERS, is_public, nested
from engine.families.ernie4_5_vl.stamp import TimeStamp
from engine.families.family import Family
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, integer, number, vision_activation
from engine.families.parsing.model import (
    ConfigReader,
    TokenId,
    named_tokens,
    nested_text,
    tied_unless_stated,
    token_field,
)
from engine.families.parsing.tower import axial_theta
from engine.families.qwen2_vl.config import native_vision
from engine.families.qwen2_vl.positions import grid_positions
from engine.families.qwen2_vl.processor import ImageRules, QwenProcessor, VideoRules
from engine.media.video.sampling import ernie_indices
from engine.prompt import MediaSpan
from engine.vision.native_config import NativeVisionConfig, TemporalMergerConfig
from engine.vision.transformer_config import VisionConfig

_TOWER, _RESAMPLER = r"(?:model\.)?vision_(?:model|tower)\.", r"(?:model\.)?resampler_model\."
#: The tokenizer's fields of the tokens whose places rows take, and the public models' values.
_TOKENS = {"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
#: Fields of config.json with the tokens that have the experts of images and videos, and the public ids.
_VISION_TOKENS = {
    "image_token_id": 100295,
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_token_id": 103367,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
}


_nested_text = tied_unless_stated(nested_text("ernie4_5_vl_moe_text"))


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    return _nested_text(nested(raw))


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    raw = nested(raw)
    filled = {
        "depth": 32,
        "hidden_size": 1280,
        "hidden_act": "quick_gelu",
        "num_heads": 16,
        "intermediate_size": 5120,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_merge_size": 2,
        "rms_norm_eps": 1e-6,
        **(raw.get("vision_config") or {}),
        "temporal_patch_size": 1,
        "out": hidden,
    }
    if filled["temporal_merge_size"] != 2:
        raise CheckpointError(
            f"config.json: vision_config.temporal_merge_size {filled['temporal_merge_size']!r} should be 2",
            param="vision_config",
        )
    eps = number(filled, "rms_norm_eps")
    text = {"rms_norm_eps": 1e-5, **(raw.get("text_config") or {})}

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return VisionConfig(
            hidden_size=width,
            intermediate_size=integer(filled, "intermediate_size"),
            num_layers=integer(filled, "depth"),
            num_heads=integer(filled, "num_heads"),
            patch_dim=patch_dim,
            activation=vision_activation(filled["hidden_act"]),
            norm_eps=eps,
            post_norm=True,
            rope_theta=axial_theta(filled),
        )

    return native_vision(
        filled,
        processor,
        hidden,
        width_field="hidden_size",
        out_field="out",
        tower=tower,
        temporal=TemporalMergerConfig(2, eps, number(text, "rms_norm_eps")),
    )


def _token(name: str) -> TokenId:
    """The id in a field of ``_VISION_TOKENS``."""
    find = token_field(name, default=_VISION_TOKENS[name])
    return lambda raw, decoder: find(nested(raw), decoder)


def _finished(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """``config`` with the placeholders of its tokenizer, and the tokens that have experts of their own."""
    decoder = config.decoder
    ids = [_token(name)(checkpoint.config, decoder) for name in _VISION_TOKENS]
    if decoder.experts is not None:
        experts = replace(decoder.experts, vision_tokens=tuple(token for token in ids if token is not None))
        decoder = replace(decoder, experts=experts)
    texts = PLACEHOLDERS if is_public(checkpoint.config) else named_tokens(checkpoint, _TOKENS)
    return replace(config, decoder=decoder, extra=texts)


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    alike = config.image_token_id == config.video_token_id
    return PromptFormat(
        image=config.extra["image_token"],
        video=config.extra["video_token"],
        video_behind="<|VIDEO_START|>" if alike else "",
    )


def _positions(config: ModelConfig, ids: Sequence[int], spans: Sequence[MediaSpan]) -> tuple[np.ndarray, int]:
    vision: NativeVisionConfig = config.vision
    return grid_positions(len(ids), spans, vision.merge_size, frames_per_step=vision.frames_per_row)


def _processor(checkpoint: Checkpoint, config: ModelConfig, options: Json) -> QwenProcessor:
    videos = VideoRules(
        sample=ernie_indices,
        bounds=(299 * 28 * 28, 1196 * 28 * 28),
        named_bounds=False,
        frames=(16, 180),
        stamp=TimeStamp.of(checkpoint, checkpoint.video_preprocessor_config),
    )
    # Transformers' class doesn't read min_pixels and max_pixels; the publisher's does.
    named = is_public(checkpoint.config)
    images = ImageRules(bounds=(56 * 56, 6177 * 28 * 28), named_bounds=named)
    return QwenProcessor.create(checkpoint, config, options, videos, images)


def _weights(config: ModelConfig) -> WeightRules:
    experts, layers = config.decoder.experts, r"(spatial|temporal)_linear\."
    return WeightRules(
        language=ernie_vl_rules(0 if experts is None else experts.router.num_experts),
        vision=(
            (_TOWER + r"patch_embed\.proj\.(.*)", r"tower.patch_embed.\1"),
            (_TOWER + r"(blocks\..*)", r"tower.\1"),
            (_TOWER + r"ln\.(.*)", r"tower.post_norm.\1"),
            (_RESAMPLER + layers + r"(?:0|fc1)\.(.*)", r"merger.\1.mlp.fc1.\2"),
            (_RESAMPLER + layers + r"(?:2|fc2)\.(.*)", r"merger.\1.mlp.fc2.\2"),
            (_RESAMPLER + layers + r"(?:3|ln)\.(.*)", r"merger.\1.norm.\2"),
            (_RESAMPLER + r"mlp\.(.*)", r"merger.proj.\1"),
            (_RESAMPLER + r"after_norm\.(.*)", r"merger.out_norm.\1"),
        ),
        ignore=(_TOWER + r"rotary_pos_emb\.inv_freq", MULTI_TOKEN_LAYERS),
    )


FAMILY = Family(
    name="ernie4_5_vl",
    architectures=(
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VL_MoeForConditionalGeneration",
    ),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        image_token=_token("image_token_id"),
        video_token=_token("video_token_id"),
        finish=_finished,
    ),
    prompt_format=_prompt_format,
    positions=_positions,
    processor=_processor,
    options=("min_pixels", "max_pixels", "fps"),
    weights=_weights,
    build_encoder=native_encoder,
)
